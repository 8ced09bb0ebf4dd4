"""The command: what it says is in the JSON, for random and trained weights; bad input in one line."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DATA

from twotower_jax import cli, programs, sources
from twotower_jax.benchmark import report, subject
from twotower_jax.benchmark.clock import Seconds
from twotower_jax.benchmark.pieces import Timed

PIECES = {"AR step", "commit", "verify", "head, 1 position", "head, 16 positions", "sampler", "denoiser pass", "refine"}


def run(capsys, *argv):
    status = cli.main(["bench", *map(str, argv)])
    out, err = capsys.readouterr()
    return status, out, err


def check_pieces(result):
    rates = result["rates"]
    for piece in result["pieces"]:
        moved = piece["bytes"] / max(rates["read"], rates["copied"])
        done = piece["operations"] / rates["operations"]
        assert piece["limit_seconds"] == max(moved, done)
        assert piece["bound"] == ("bytes" if moved >= done else "operations")
        assert piece["share_of_limit"] == piece["limit_seconds"] / piece["seconds"]
        assert 0 < piece["seconds_least"] <= piece["seconds"]
        assert piece["compile_seconds"] > 0
    for n in {piece["rows"] for piece in result["pieces"]}:
        assert {p["piece"] for p in result["pieces"] if p["rows"] == n} - {"prefill, 32 tokens"} == PIECES


@pytest.fixture
def compiled_late(monkeypatch):
    """What was compiled after the first piece was begun to be timed."""
    found, started, timed, original = [], [], report.pieces.timed, programs._compiled
    monkeypatch.setattr(report.pieces, "timed", lambda *args: (started.append(args), timed(*args))[1])

    def noted(lowered):
        if started:
            found.append(lowered)
        return original(lowered)

    monkeypatch.setattr(programs, "_compiled", noted)
    return found


@pytest.mark.slow
def test_random_weights(capsys, hasty, small_config, tmp_path, compiled_late):
    options = ["--rows", 2, "--context", 32, "--max-new-tokens", 48, "--passes", 2, "--dtype", "float32"]
    status, out, err = run(capsys, small_config, *options, "--out", tmp_path / "out.json")
    assert status == 0, err
    assert compiled_late == []
    result = json.loads((tmp_path / "out.json").read_text())
    assert out.splitlines() == report.table(result)
    assert result["finished"]
    assert result["compile_seconds"] > max(piece["compile_seconds"] for piece in result["pieces"])
    check_pieces(result)
    assert result["weights"] == "random"
    assert (result["dtype"], result["context"], result["device"]) == ("float32", 32, jax.devices()[0].device_kind)
    assert {"date", "python", "jax", "jaxlib", "platform", "cores"} <= result.keys()
    assert result["memory"]["peak_bytes"] > 0
    found = {(rate["mode"], rate["source"]) for rate in result["decoding"]}
    assert found == {(mode, source) for mode in ("ar", "diffusion") for source in ("engine", "pieces")} | {
        ("verified", "pieces")
    }


@pytest.mark.slow
def test_trained_weights(capsys, hasty, compiled_late):
    options = ["--rows", 2, "--context", 32, "--max-new-tokens", 48, "--dtype", "float32", "--json"]
    status, out, err = run(capsys, "demo", *options)
    assert status == 0, err
    assert compiled_late == []
    result = json.loads(out)
    check_pieces(result)
    assert result["weights"] == "trained"
    found = {rate["mode"]: rate for rate in result["decoding"]}
    assert {rate["source"] for rate in found.values()} == {"engine"}
    assert found["ar"]["tokens_per_forward"] == 1
    assert found["diffusion"]["tokens_per_forward"] > 2


@pytest.fixture
def unmeasured(small, small_rows, monkeypatch):
    """Nothing is compiled or timed, and the small model's weights and rows are used: unmeasured(piece), of each."""

    def made(description, *about):
        return {name: jax.tree.map(jnp.copy, small.params[name]) for name in description}

    def prepare(piece):
        def timed(one, given, programs, group, params):
            piece(one, params)
            return Timed(Seconds(2.0, 1.0), 3.0, 4)

        monkeypatch.setattr(report.pieces, "timed", timed)

    monkeypatch.setattr(subject, "random_parameters", made)
    monkeypatch.setattr(report.pieces, "begin", lambda *args: None)
    monkeypatch.setattr(report.rows.Reader, "begin", lambda *args: None)
    monkeypatch.setattr(report.rows.Reader, "read", lambda *args: small_rows)
    choices = small_rows.token_choices
    denoised = dataclasses.replace(small_rows, pass_choices=choices)
    monkeypatch.setattr(report.rows.Reader, "denoised", lambda *args: denoised)
    return prepare


ALONE = ["--context", 32, "--max-new-tokens", 48, "--one-tower-at-a-time"]


def test_one_tower_at_a_time(capsys, hasty, small_config, unmeasured, monkeypatch):
    """Never both are there, all pieces are timed, and what the engine would do is derived."""
    held, tower = [], {}
    original = subject.Subject.hold
    monkeypatch.setattr(subject.Subject, "hold", lambda self, *names: held.append(names) or original(self, *names))

    def piece(one, params):
        assert len(params) == 1
        tower[one.name] = one.tower

    unmeasured(piece)
    status, out, err = run(capsys, small_config, "--rows", 1, *ALONE, "--json")
    assert status == 0, err
    assert held == [("context",), ("context",), ("denoiser",)]
    result = json.loads(out)
    check_pieces(result)
    assert tower["denoiser pass"] == "denoiser"
    assert tower["commit"] == "context"
    assert {rate["source"] for rate in result["decoding"]} == {"pieces"}
    assert {rate["tokens_per_second"] for rate in result["decoding"] if rate["mode"] == "ar"} == {0.5}
    assert sum("2000.000" in line for line in report.table(result)) == len(result["pieces"])


def test_a_run_that_is_stopped(capsys, hasty, small_config, unmeasured, tmp_path):
    """What was timed is printed and in the file, and what is printed never changes."""
    file, seen = tmp_path / "out.json", []

    def piece(one, params):
        seen.append(json.loads(file.read_text()))
        if len(seen) == 4:
            raise KeyboardInterrupt

    unmeasured(piece)
    status, out, err = run(capsys, small_config, "--rows", 1, 2, *ALONE, "--out", file)
    assert status == 130
    assert err.endswith("twotower: interrupted\n")
    assert [len(result["pieces"]) for result in seen] == [0, 1, 2, 3]
    left = json.loads(file.read_text())
    assert left == seen[-1]
    assert not left["finished"]
    assert out.splitlines() == report.table(left)
    for result in seen:
        table = report.table(result)
        assert out.splitlines()[: len(table)] == table
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.slow
def test_random_parameters(small_config):
    """Those of a tower are the same whichever others are there, and the towers differ."""
    small = subject.find(small_config, "float32")
    small.hold("context", "denoiser")
    alone = subject.find(small_config, "float32").hold("denoiser")["denoiser"]
    assert jax.tree.all(jax.tree.map(np.array_equal, alone, small.params["denoiser"]))
    own, other = (small.params[name]["tower"]["layers_1"]["mixer"]["up"] for name in ("context", "denoiser"))
    assert not np.array_equal(own, other)
    for name, description in small.description.items():
        shapes = jax.tree.map(lambda p: small.config.shape(p.axes), description)
        found = jax.tree.map(lambda x: x.shape, small.params[name])
        assert shapes == found
    assert small.bytes("context", "denoiser") == sum(x.nbytes for x in jax.tree.leaves(small.params))


def test_what_matters_comes_first(small):
    """Of so many rows."""
    setting = report.pieces.Setting(small.config, small.dtype, 2, 32, 128, 16, 3)
    names = [piece.name for piece in report._pieces(setting, small.shapes)]
    assert names[:2] == ["AR step", "denoiser pass"]
    assert {*names} - {"prefill, 32 tokens"} == PIECES


def test_named():
    """The configurations that ship; the released one is NVIDIA's."""
    assert sources.configurations() == ["mid", "released"]
    there = json.loads((DATA / "released" / "config.json").read_text())
    assert json.loads((sources.CONFIGS / "released.json").read_text()) == there
    mid, backbone = sources.config_alone("mid")
    assert not backbone
    assert (mid.pattern, mid.hidden_size, mid.vocab_size) == ("MEMEM*EMEM*E", 512, 8192)
    assert (mid.attention_heads, mid.kv_heads, mid.head_dim) == (8, 2, 64)
    assert (mid.mamba_heads, mid.mamba_head_dim, mid.state_size, mid.mamba_groups) == (16, 64, 64, 4)
    assert (mid.experts, mid.expert_width, mid.experts_per_token, mid.shared_width) == (32, 352, 4, 704)


BAD = [
    (["nothing"], "nothing does not exist"),
    (["nothing"], "demo, mid, released"),
    (["mid", "--out", "/"], "--out / cannot be written"),
    (["demo", "--passes", "5"], "--passes are for random weights"),
    (["mid", "--rows", "0"], "--rows must be from 1"),
    (["mid", "--context", "20"], "--context must be a multiple of 16, the block size, not 20"),
    (["mid", "--max-new-tokens", "32"], "--max-new-tokens must be from 48"),
    (["mid", "--passes", "17"], "--passes must be a number, 1 or more and at most 16, not 17"),
    (["mid", "--dtype", "float64"], "choose float32 or bfloat16"),
    (["mid", "--out", "/nothing/here.json"], "--out /nothing/here.json cannot be written"),
    (["mid", "--rows", "65536", "--context", "1048576"], "mid with 65536 rows of 1048640 tokens would take"),
    (["mid", "--prompts", "x"], "--prompts is for models that are loaded"),
    (["demo", "--prompts", "/nothing/here"], "cannot read /nothing/here"),
    (["demo", "--prompts", "/dev/null"], "/dev/null has no prompts"),
    (["demo", "--one-tower-at-a-time"], "one tower at a time is for random weights"),
    ([str(DATA / "tiny-0")], "has no tokenizer.json"),
    ([str(DATA / "trained-0")], "give --prompts FILE"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: str(value)[-40:])
def test_bad_input(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert message in err
    assert err.startswith("twotower: ")
    assert err.count("\n") == 1

"""The command as a user types it."""

import json
import subprocess
import sys

import pytest
from conftest import DATA

from twotower_jax import cli

TINY = str(DATA / "tiny-0")


def run(capsys, *argv) -> tuple[int, str, str]:
    status = cli.main(list(argv))
    out, err = capsys.readouterr()
    return status, out, err


def run_json(capsys, *argv) -> dict:
    status, out, err = run(capsys, *argv, "--json")
    assert status == 0, err
    return json.loads(out)


def test_generate(capsys):
    """The README's first command."""
    status, out, _ = run(capsys, "generate", "demo", "--prompt", "upper try range =")
    assert status == 0
    text, counts, times = out.splitlines()
    assert text == "upper try range = TRY RANGE"
    assert counts.startswith("[11 tokens, ")
    assert "tokens per forward" in counts
    assert "s to compile" in times


@pytest.mark.parametrize("mode", ["diffusion", "ar", "mock-ar"])
def test_generate_json(capsys, demo_prompts, mode, tmp_path):
    one, two, three = demo_prompts[:3]
    (tmp_path / "prompt").write_text(two["prompt"] + "\n")
    ids = ",".join(str(byte + 4) for byte in three["prompt"].encode())
    prompts = ["--prompt", one["prompt"], "--prompt-file", str(tmp_path / "prompt"), "--ids", ids]
    options = ["--mode", mode, "--dtype", "float32", "--max-new-tokens", "32"]
    result = run_json(capsys, "generate", "demo", *prompts, *options)
    key = {"diffusion": "g0.8_T16", "ar": "ar", "mock-ar": "mock_ar"}[mode]
    assert [row["tokens"] for row in result["rows"]] == [p[key] for p in (one, two, three)]
    assert result["mode"] == mode
    for row in result["rows"]:
        assert row["tokens_per_forward"] == len(row["tokens"]) / row["forwards"]
        assert row["text"].encode() == bytes(token - 4 for token in row["tokens"] if token != 14)
    assert result["compile_seconds"] > 0


def test_diffusion_options(capsys):
    options = ["--block-size", "8", "--steps-per-block", "2", "--confidence-threshold", "1", "--mask-token-id", "3"]
    result = run_json(capsys, "generate", TINY, "--ids", "5 6 7", *options, "--max-new-tokens", "16")
    assert result["rows"][0]["forwards"] == 4
    assert result["rows"][0]["text"] is None


def test_eos(capsys):
    """config.json's by default, none or others on request."""
    command = ["generate", "demo", "--prompt", "copy a =", "--mode", "ar", "--max-new-tokens", "30"]
    assert run_json(capsys, *command)["rows"][0]["tokens"][-1] == 14
    assert len(run_json(capsys, *command, "--eos-token-id", "none")["rows"][0]["tokens"]) == 30
    assert run_json(capsys, *command, "--eos-token-id", "36")["rows"][0]["tokens"] == [36]


def test_sampling_options(capsys):
    command = ["generate", "demo", "--prompt", "copy a =", "--temperature", "2", "--max-new-tokens", "16"]
    one = run_json(capsys, *command, "--top-k", "5", "--seed", "1")
    other = run_json(capsys, *command, "--top-k", "5", "--seed", "2")
    assert one["rows"][0]["tokens"] != other["rows"][0]["tokens"]
    run_json(capsys, *command, "--mode", "ar", "--top-p", "0.5")


BAD = [
    (["demo"], "give a prompt: --prompt TEXT, --prompt-file FILE or --ids"),
    ([TINY, "--prompt", "text"], "has no tokenizer.json, so give the prompt as token ids: --ids"),
    ([TINY, "--ids", "5,x"], "--ids takes whole numbers"),
    ([TINY, "--ids", ""], "prompt 0 is empty"),
    ([TINY, "--ids", "5,999"], "has id 999 at position 1; ids go from 0 to 127"),
    (["demo", "--prompt", ""], "prompt 0 is empty"),
    (["demo", "--prompt", "bad \udcff byte"], "the prompt is not text in this terminal's encoding"),
    (["demo", "--prompt-file", "/nothing/here"], "cannot read /nothing/here"),
    (["/nothing/here", "--ids", "5"], "does not exist"),
    ([TINY, "--ids", "5", "--dtype", "float64"], "choose float32 or bfloat16"),
    ([TINY, "--ids", "5", "--confidence-threshold", "2"], "confidence_threshold must be"),
    ([TINY, "--ids", "5", "--mode", "ar", "--block-size", "8"], "--block-size is no option of --mode ar"),
    ([TINY, "--ids", "5", "--top-p", "0.5"], "--top-p is no option of --mode diffusion"),
    ([str(DATA / "backbone-0"), "--ids", "5"], "this model is a backbone"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: str(value)[-40:])
def test_bad_input(capsys, arguments, message):
    status, out, err = run(capsys, "generate", *arguments)
    assert status == 2
    assert out == ""
    assert message in err
    assert err.startswith("twotower: ")
    assert err.count("\n") == 1


def test_output_that_cannot_be_written():
    """A full disk gets a line, a reader that leaves gets none; never a traceback."""
    command = [sys.executable, "-m", "twotower_jax.cli", "generate", TINY, "--ids", "5", "--max-new-tokens", "1"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "No space left on device" in ended.stderr
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 1


def test_bad_tokenizer(capsys, tmp_path):
    for file in (DATA / "tiny-0").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").write_text("{}")
    status, _, err = run(capsys, "generate", str(tmp_path), "--prompt", "x")
    assert status == 2
    assert "tokenizer.json is no tokenizer" in err


def test_convert(capsys, tmp_path):
    made = run_json(capsys, "convert", TINY, str(tmp_path / "ours"))
    assert made["two_towers"]
    assert made["format"] == "orbax"
    one, other = (
        run_json(capsys, "generate", folder, "--ids", "5,6,7", "--max-new-tokens", "16")
        for folder in (TINY, str(tmp_path / "ours"))
    )
    assert one["rows"] == other["rows"]
    status, _, err = run(capsys, "convert", TINY, str(tmp_path / "ours"))
    assert status == 2
    assert "exists; give a folder that does not" in err

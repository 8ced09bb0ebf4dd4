"""The command as a user types it."""

import json
import subprocess
import sys

import pytest
from conftest import DATA, write_broken_model

from twotower_jax import cli

TINY = str(DATA / "tiny-0")
TRAINED = str(DATA / "trained-0")  # bytes are its tokens, and a newline ends a row
NOT_FINITE = "a logit was not finite; the row ends before it"


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
    status, out, _ = run(capsys, "generate", "demo", "--prompt", "spell heart wood tiger =")
    assert status == 0
    text, counts, times = out.splitlines()
    assert text == "spell heart wood tiger = h e a r t, w o o d, t i g e r"
    assert counts.startswith("[17 tokens, ")
    assert "tokens per forward" in counts
    assert "s to compile" in times


@pytest.mark.parametrize("mode", ["diffusion", "ar", "mock-ar"])
def test_generate_json(capsys, task_prompts, mode, tmp_path):
    one, two, three = task_prompts[:3]
    (tmp_path / "prompt").write_text(two["prompt"] + "\n")
    ids = ",".join(str(byte + 4) for byte in three["prompt"].encode())
    prompts = ["--prompt", one["prompt"], "--prompt-file", str(tmp_path / "prompt"), "--ids", ids]
    options = ["--mode", mode, "--dtype", "float32", "--max-new-tokens", "32"]
    result = run_json(capsys, "generate", TRAINED, *prompts, *options)
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
    command = ["generate", TRAINED, "--prompt", "copy a =", "--mode", "ar", "--max-new-tokens", "30"]
    assert run_json(capsys, *command)["rows"][0]["tokens"][-1] == 14
    assert len(run_json(capsys, *command, "--eos-token-id", "none")["rows"][0]["tokens"]) == 30
    assert run_json(capsys, *command, "--eos-token-id", "36")["rows"][0]["tokens"] == [36]


def test_sampling_options(capsys):
    command = ["generate", TRAINED, "--prompt", "copy a =", "--temperature", "2", "--max-new-tokens", "16"]
    one = run_json(capsys, *command, "--top-k", "5", "--seed", "1")
    other = run_json(capsys, *command, "--top-k", "5", "--seed", "2")
    assert one["rows"][0]["tokens"] != other["rows"][0]["tokens"]
    run_json(capsys, *command, "--mode", "ar", "--top-p", "0.5")


BAD = [
    (["demo"], "give a prompt: --prompt TEXT, --prompt-file FILE or --ids"),
    ([TINY, "--prompt", "text"], "has no tokenizer.json, so give the prompt as token ids: --ids"),
    ([TINY, "--ids", "5,x"], "--ids takes whole numbers"),
    ([TINY, "--ids", ""], "prompt 0 is empty"),
    ([TINY, "--ids", "5,,7"], "--ids takes whole numbers"),
    ([TINY, "--ids", "1_0"], "--ids takes whole numbers"),
    (["a" * 300, "--ids", "5"], "is no path: File name too long"),
    ([TINY, "--ids", "5", "--eos-token-id", "x"], "--eos-token-id takes whole numbers, or none alone, not x"),
    ([TINY, "--ids", "5", "--eos-token-id", "none", "--eos-token-id", "14"], "or none alone, not none 14"),
    (["", "--ids", "5"], "is no path"),
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


def test_what_the_devices_say():
    """Gloo speaks of a process that has ended in a ValueError; others are faults of ours."""
    assert cli._of_devices(ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"))
    assert not cli._of_devices(ValueError("not enough values to unpack"))


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


def test_a_row_that_fails(capsys, tmp_path):
    """Exit status 1; the error stands with its row, and the other row is whole."""
    write_broken_model(tmp_path)
    command = ["generate", str(tmp_path), "--ids", "5,9,6", "--ids", "5,6", "--max-new-tokens", "16"]
    status, out, _ = run(capsys, *command)
    assert status == 1
    assert out.splitlines()[:3] == ["", "[0 tokens, 1 forwards, 0.00 tokens per forward]", f"[{NOT_FINITE}]"]
    status, out, _ = run(capsys, *command, "--json")
    assert status == 1
    assert [row["error"] for row in json.loads(out)["rows"]] == [NOT_FINITE, None]
    assert [len(row["tokens"]) for row in json.loads(out)["rows"]] == [0, 16]


def test_prompt_is_shown_as_given(capsys, tmp_path, monkeypatch):
    """Newlines and all, though a newline is EOS; of a file's end one newline is not of the prompt."""
    (tmp_path / "prompt").write_bytes(b"upper a =\nA\r\nlower\n\n")
    options = ["--max-new-tokens", "1", "--mode", "ar"]
    (row,) = run_json(capsys, "generate", TRAINED, "--prompt-file", str(tmp_path / "prompt"), *options)["rows"]
    assert row["prompt"] == "upper a =\nA\r\nlower\n"
    assert row["prompt_tokens"] == len(row["prompt"])
    ids = ",".join(str(byte + 4) for byte in b"a\nb\n")
    (row,) = run_json(capsys, "generate", TRAINED, "--ids", ids, *options)["rows"]
    assert row["prompt"] == "a\nb\n"


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


def test_demo(capsys):
    """The tour: every mode on the same prompts, and what it says of them is so."""
    result = run_json(capsys, "demo")
    ar, diffusion = result["modes"]["ar"], result["modes"]["diffusion"]
    assert ar["exact_match"] >= 0.9
    assert diffusion["exact_match"] >= 0.8
    assert ar["tokens_per_forward"] == 1
    assert diffusion["tokens_per_forward"] > 2.42
    assert [row["text"] for row in result["modes"]["verified"]["rows"]] == [row["text"] for row in ar["rows"]]
    assert result["modes"]["verified"]["tokens_per_forward"] > 2
    prompts = [row["prompt"] for row in ar["rows"]]
    for mode in result["modes"].values():
        assert [row["prompt"] for row in mode["rows"]] == prompts
        assert mode["exact_match"] == sum(row["right"] for row in mode["rows"]) / len(prompts)
    alone = run_json(capsys, "generate", "demo", "--prompt", prompts[0], "--mode", "ar", "--max-new-tokens", "32")
    assert alone["rows"][0]["text"] == ar["rows"][0]["text"]

"""What a run's file may say."""

import glob

import pytest

import twotower_jax as tt
from twotower_jax.training.config import read_training_config

GOOD = """
output = "out"
model = "base"
{}
[data]
files = ["a.jsonl"]
length = 64
rows = 4
{}
[[stages]]
steps = 10
{}
"""


def read(tmp_path, *parts):
    file = tmp_path / "run.toml"
    file.write_text(GOOD.format(*(*parts, "", "", "")[:3]))
    return read_training_config(file)


def test_defaults_and_paths(tmp_path):
    (tmp_path / "base").mkdir()
    c = read(tmp_path)
    assert c.output == str(tmp_path / "out")
    assert c.model == str(tmp_path / "base")
    assert c.data.files == (str(tmp_path / "a.jsonl"),)
    assert (c.objective, c.stages[0].block_size, c.steps) == ("denoise", 16, 10)
    (tmp_path / "base").rmdir()
    assert read(tmp_path).model == "base"  # a shipped model, or an id


BAD = [
    (("objective = 'gan'",), "objective must be ar or denoise or tied, not 'gan'"),
    (("speed = 5",), "speed is no setting; known are output, model"),
    (("clip = 0",), "clip must be above 0"),
    (("clip = nan",), "clip must be a number of 0 or more"),
    (("weight_decay = true",), "weight_decay must be a number"),
    (("seed = 1.5",), "seed must be a whole number"),
    (("remat = 1",), "remat must be true or false"),
    (("dtype = 'float16'",), "dtype must be float32 or bfloat16"),
    (("accumulate = 3",), "accumulate 3 does not divide data.rows 4"),
    (("keep = 0",), "keep must be 1 or more"),
    (("", "blocks = 9"), "data.blocks 9 of stages[0].block_size 16 are more than data.length 64"),
    (("", "tokenizer = 5"), "data.tokenizer must be a text"),
    (("", "", "block_size = 24"), "stages[0].block_size 24 does not divide data.length 64"),
    (("", "", "warmup = 8\ndecay = 8"), "stages[0]: warmup and decay are more than its steps"),
    (("", "", "[[stages]]\nblock_size = 8"), "stages[1].steps is missing"),
    (("= 5",), "is not TOML"),
    ((f"clip = 1{'0' * 400}",), "clip must be a number of 0 or more, and below 2^53"),
    (("", f"blocks = {2**60}"), "data.blocks must be a number of 0 or more, and below 2^53"),
    (("", "", f"warmup = 1\n[[stages]]\nsteps = {2**31}"), "the stages' steps must be below 2^31 together"),
    (("objective = 'ar'\nar_weight = 1",), "objective ar has no ar_weight or elbo_weight"),
]


@pytest.mark.parametrize(("parts", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_settings(tmp_path, parts, message):
    with pytest.raises(tt.InputError) as error:
        read(tmp_path, *parts)
    assert message in str(error.value)
    assert "run.toml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("length = 64", f"length = {2**30}", "data.rows times data.length must be below 2^31"),
        ('"out"', '"o\\u0000t"', "is no path"),
        ('["a.jsonl"]', "[]", "data.files must be a list of texts, one or more, not []"),
    ],
)
def test_bad_values(tmp_path, old, new, message):
    file = tmp_path / "run.toml"
    assert old in GOOD
    file.write_text(GOOD.format("", "", "").replace(old, new))
    with pytest.raises(tt.InputError) as error:
        read_training_config(file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_named_like_a_pattern(tmp_path):
    """Its name is taken as it is; what the file says is a pattern."""
    home = tmp_path / "try[1]"
    home.mkdir()
    (home / "a.jsonl").touch()
    assert [glob.glob(pattern) for pattern in read(home).data.files] == [[str(home / "a.jsonl")]]


def test_no_file(tmp_path):
    with pytest.raises(tt.InputError, match="cannot read"):
        read_training_config(tmp_path / "none.toml")

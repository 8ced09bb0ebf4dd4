"""The shipped model is what the README says of it, on the held-out prompts."""

import pytest
from conftest import load

from experiments.ablations import ABLATIONS, ablated
from experiments.demo import tasks
from experiments.evaluate import evaluate


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tasks.write(folder, train=0)
    return tasks.read(folder / "test.jsonl")


def test_quality(examples):
    """500 prompts: AR is right nearly always, and diffusion keeps 98.7 % of that at 2.42 tokens a forward."""
    assert len(examples) == 500
    ar, diffusion = (evaluate(load("demo"), examples, mode) for mode in ("ar", "g0.8_T16"))
    assert ar["exact_match"] >= 0.95
    assert ar["tokens_per_forward"] == 1
    assert diffusion["exact_match"] >= 0.987 * ar["exact_match"]
    assert diffusion["tokens_per_forward"] >= 2.42
    assert 0 < diffusion["commits"] < diffusion["forwards"]


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_take_something_away(examples, name):
    part, (change, mode) = examples[:30], ABLATIONS[name]
    whole = evaluate(load("demo"), part, "g0.8_T16")
    load.cache_clear()
    with ablated(change):
        found = evaluate(load("demo"), part, mode)
    load.cache_clear()
    assert (found == whole) == (name == "as trained")

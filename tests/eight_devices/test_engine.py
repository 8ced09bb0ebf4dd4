"""Rows at their own pace on several devices write what one device writes."""

import pytest
from conftest import DATA, load
from streams import heard, random_requests

import twotower_jax as tt

SPLIT = {"one device each": ([0], [1], None), "experts and heads": (range(4), range(4, 8), {"expert": 2, "tensor": 2})}
SHARED = {"rows": (range(2), range(2), {"data": 2}), "experts": (range(4), range(4), {"expert": 4})}


def assert_as_on_one(where, count=24):
    alone = load("tiny-0")
    requests = list(random_requests(alone, count))
    tokens, last = heard(alone.stream(requests, slots=8))
    model = tt.load(DATA / "tiny-0", dtype="float32", placement=tt.Placement(*where))
    found, ends = heard(model.stream(requests, slots=8))
    assert found == tokens
    for key, event in ends.items():
        assert (event.end, event.error) == (last[key].end, None)
        assert (event.denoiser_forwards, event.context_forwards) == (
            last[key].denoiser_forwards,
            last[key].context_forwards,
        )


def test_towers_apart():
    assert_as_on_one(SPLIT["one device each"])


@pytest.mark.slow
@pytest.mark.parametrize("where", [SPLIT["experts and heads"], *SHARED.values()])
def test_towers_divided(where):
    assert_as_on_one(where, count=60)

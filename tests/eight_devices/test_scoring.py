"""The scores of one device, in float32, wherever the towers are and however they are divided."""

import numpy as np
import pytest
from conftest import DATA, load

import twotower_jax as tt

ALL = range(8)
LATER = pytest.mark.slow
PREAMBLE = list(range(20, 60))
PAIRS = [([*PREAMBLE, i, 9], [i + 3, 7, 8][: 1 + i % 3]) for i in range(11)] + [([5], [6, 7] * 20)]


@pytest.mark.parametrize(
    ("model", "where"),
    [
        pytest.param("tiny-0", (range(4), range(4, 8), {"data": 2, "tensor": 2}), id="split, 2 x 2", marks=LATER),
        pytest.param("tiny-0", (ALL, ALL, {"data": 2, "expert": 2, "tensor": 2}), id="2 x 2 x 2", marks=LATER),
        pytest.param("tiny-0", (ALL, ALL, {"expert": 8}), id="experts", marks=LATER),
        pytest.param("grouped-0", ([4, 5], [3, 2], {"tensor": 2}), id="grouped, split", marks=LATER),
    ],
)
def test_scores_of_one_device(model, where):
    placed, alone = tt.load(DATA / model, dtype="float32", placement=tt.Placement(*where)), load(model)
    for by in ("context", "denoiser"):
        options = {"by": by, "samples": 3, "per_token": True}
        found, expected = placed.score(PAIRS, **options), alone.score(PAIRS, **options)
        for one, other in zip(found.per_token, expected.per_token, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-4)
        assert found.greedy == expected.greedy
        assert found.errors == [None] * len(PAIRS)

"""The threshold rule against a plain-loop statement of it."""

import math

import numpy as np
import pytest

from twotower_jax.decoding.unmasking import ThresholdUnmasking


def plain(confidence, masked, step, threshold, steps):
    """The positions of one row to commit."""
    open_positions = [i for i in range(len(masked)) if masked[i]]
    n = len(open_positions)
    sure = sum(confidence[i] > threshold for i in open_positions)
    wanted = n if step == steps - 1 else max(sure, 1, math.ceil(n / (steps - step)))
    return sorted(sorted(open_positions, key=lambda i: (-confidence[i], i))[:wanted])


@pytest.mark.parametrize("steps", [1, 2, 5, 16])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9, 1.0])
def test_equals_plain_loop(steps, threshold):
    rng = np.random.default_rng(steps)
    rows, size = 200, 16
    confidence = rng.choice(np.linspace(0, 1, 9), (rows, size)).astype(np.float32)  # with many equals, and 1.0
    masked = rng.random((rows, size)) < rng.random((rows, 1))
    step = rng.integers(0, steps, rows)
    chosen = np.asarray(ThresholdUnmasking(np.float32(threshold), steps).choose(confidence, masked, step))
    for row in range(rows):
        expected = plain(confidence[row], masked[row], step[row], np.float32(threshold), steps)
        assert np.flatnonzero(chosen[row]).tolist() == expected

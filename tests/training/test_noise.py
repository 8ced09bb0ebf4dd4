"""Masks of the linear schedule."""

import jax
import numpy as np
import pytest

from twotower_jax.training.noise import draw_masks, draw_times


@pytest.mark.parametrize("times", ["uniform", "stratified"])
def test_times_are_uniform(times):
    t = np.asarray(draw_times(jax.random.key(0), (64, 50), times)).ravel()
    assert ((t >= 0) & (t < 1)).all()
    counts = np.bincount((t * 8).astype(int), minlength=8)
    expected = len(t) / 8
    assert (np.abs(counts - expected) < (1 if times == "stratified" else 5 * np.sqrt(expected))).all()


def test_stratified_times_are_in_no_order():
    t = np.asarray(draw_times(jax.random.key(0), (20, 50), "stratified")).ravel()
    assert abs(np.corrcoef(t, np.arange(len(t)))[0, 1]) < 0.15


def test_masks_have_their_share():
    """Each position with probability t, one at least."""
    t = np.repeat(np.array([[0.0, 0.1, 0.5, 0.99]]), 4000, axis=0)
    masks = np.asarray(draw_masks(jax.random.key(1), t, 16))
    assert masks.any(-1).all()
    share = masks.mean((0, 2))
    assert share[0] == 1 / 16
    assert abs(share[2] - 0.5) < 0.01
    assert abs(share[3] - 0.99) < 0.01
    np.testing.assert_allclose(masks[:, 2].mean(0), 0.5, atol=0.05)  # at every position

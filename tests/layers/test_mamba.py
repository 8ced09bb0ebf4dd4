"""The causal convolution with a seeded tail."""

import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax.layers.mamba import causal_conv

TAPS, CHANNELS = 4, 3


def arrays(length):
    rng = np.random.default_rng(length)
    shapes = (2, length, CHANNELS), (2, TAPS - 1, CHANNELS), (TAPS, CHANNELS), (CHANNELS,)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_equals_plain_convolution(length):
    """Blocks shorter than the convolution's width as well."""
    x, tail, weight, bias = arrays(length)
    y, after = causal_conv(*map(jnp.asarray, (x, tail, weight, bias)), jnp.full(2, length))
    history = np.concatenate([tail, x], axis=1)
    for row in range(2):
        for t in range(length):
            expected = (history[row, t : t + TAPS] * weight).sum(0) + bias
            np.testing.assert_allclose(y[row, t], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after, history[:, -(TAPS - 1) :])


def test_tail_ends_at_the_last_real_position():
    x, tail, weight, bias = arrays(6)
    count = np.array([0, 2])
    _, after = causal_conv(*map(jnp.asarray, (x, tail, weight, bias, count)))
    np.testing.assert_array_equal(after[0], tail[0])
    np.testing.assert_array_equal(after[1], np.concatenate([tail[1, -1:], x[1, :2]]))

"""The causal convolution with a seeded tail."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_of

from twotower_jax.layers.mamba import Mamba, causal_conv
from twotower_jax.state import Span, empty_state

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


def test_time_step_is_clipped():
    """Where the limits leave dt no choice, its bias changes nothing; where they do, it does."""
    config = golden_of("tiny-0").model.config
    x = jax.random.normal(jax.random.key(0), (2, 5, config.hidden_size))
    span = Span(start=jnp.zeros(2, jnp.int32), count=jnp.full(2, 5))

    def outputs(limit):
        c = dataclasses.replace(config, time_step_limit=limit)
        state = empty_state(c, 2, 8, jnp.dtype(jnp.float32)).layers[c.pattern.index("M")]
        params = Mamba(c).init(jax.random.key(1), x, state, span)["params"]
        other = params | {"dt_bias": params["dt_bias"] + 1}
        return [Mamba(c).apply({"params": p}, x, state, span)[0] for p in (params, other)]

    one, other = outputs((0.03, 0.03))
    np.testing.assert_array_equal(one, other)
    one, other = outputs((0.0, np.inf))
    assert not np.array_equal(one, other)


def test_tail_ends_at_the_last_real_position():
    x, tail, weight, bias = arrays(6)
    count = np.array([0, 2])
    _, after = causal_conv(*map(jnp.asarray, (x, tail, weight, bias, count)))
    np.testing.assert_array_equal(after[0], tail[0])
    np.testing.assert_array_equal(after[1], np.concatenate([tail[1, -1:], x[1, :2]]))

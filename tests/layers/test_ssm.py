"""The chunked selective scan is the plain recurrence, whatever the length, the chunk and the seed of the state."""

import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax.layers.ssm import selective_scan


def inputs(rng, rows, length, heads=4, width=3, groups=2, states=5):
    draw = lambda *shape: rng.standard_normal(shape)  # noqa: E731
    dt = np.abs(draw(rows, length, heads)) * rng.choice([0.01, 1.0, 30.0], (rows, length, heads))  # some decay to 0
    a = -np.exp(draw(heads))
    return (
        draw(rows, length, heads, width),
        dt,
        a,
        draw(rows, length, groups, states),
        draw(rows, length, groups, states),
        draw(rows, heads, width, states),
    )


def recurrence(x, dt, a, b, c, state):
    """The definition, position by position, in float64."""
    b, c = (np.repeat(z, x.shape[2] // z.shape[2], axis=2) for z in (b, c))
    y = np.empty_like(x)
    for t in range(x.shape[1]):
        decay = np.exp(dt[:, t] * a)[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        y[:, t] = np.einsum("bhpn,bhn->bhp", state, c[:, t])
    return y, state


@pytest.mark.parametrize("seed", range(12))
def test_scan_equals_recurrence(seed):
    rng = np.random.default_rng(seed)
    arguments = inputs(rng, rows=rng.integers(1, 4), length=int(rng.integers(1, 40)))
    chunk_size = int(rng.integers(1, 45))
    y, state = selective_scan(*(jnp.asarray(z, jnp.float32) for z in arguments), chunk_size)
    expected_y, expected_state = recurrence(*arguments)
    scale = np.abs(expected_y).max()
    np.testing.assert_allclose(y, expected_y, atol=2e-6 * scale)
    np.testing.assert_allclose(state, expected_state, atol=2e-6 * np.abs(expected_state).max())


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 128])
def test_position_without_dt_leaves_no_trace(chunk_size):
    x, dt, a, b, c, state = inputs(np.random.default_rng(0), rows=2, length=11)
    dt[:, 7:] = 0.0
    whole = selective_scan(*(jnp.asarray(z, jnp.float32) for z in (x, dt, a, b, c, state)), chunk_size)
    x, dt, b, c = (z[:, :7] for z in (x, dt, b, c))
    short = selective_scan(*(jnp.asarray(z, jnp.float32) for z in (x, dt, a, b, c, state)), chunk_size)
    np.testing.assert_allclose(whole[1], short[1], rtol=1e-5, atol=1e-6)


def test_strong_decay_stays_finite():
    """Sums of dt A far beyond what exp can hold, in either direction."""
    x, dt, a, b, c, state = inputs(np.random.default_rng(1), rows=1, length=32)
    y, state = selective_scan(*(jnp.asarray(z, jnp.float32) for z in (x, dt * 1e4, a, b, c, state)), 16)
    assert np.isfinite(y).all()
    assert np.isfinite(state).all()

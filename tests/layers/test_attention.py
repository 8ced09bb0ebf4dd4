"""Grouped-query attention against a plain loop, and its cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax.layers import attention
from twotower_jax.state import KVCache, Span

ROWS, LENGTH, HEADS, GROUPS, WIDTH, CAPACITY = 2, 5, 6, 3, 4, 7
START, COUNT = np.array([0, 6]), np.array([5, 3])


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    new = draw(ROWS, LENGTH, HEADS, WIDTH), draw(ROWS, LENGTH, GROUPS, WIDTH), draw(ROWS, LENGTH, GROUPS, WIDTH)
    return new, KVCache(key=draw(ROWS, GROUPS, CAPACITY, WIDTH), value=draw(ROWS, GROUPS, CAPACITY, WIDTH))


def plain(new, cache, causal):
    """A softmax for each row, query and head over what it may see; only real queries."""
    query, key, value = new
    for row in range(ROWS):
        for t in range(COUNT[row]):
            seen = t + 1 if causal else COUNT[row]
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                keys = np.concatenate([cache.key[row, group, : START[row]], key[row, :seen, group]])
                values = np.concatenate([cache.value[row, group, : START[row]], value[row, :seen, group]])
                scores = np.exp(keys @ query[row, t, head] / np.sqrt(WIDTH))
                yield row, t, head, scores @ values / scores.sum()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
def test_equals_plain_loop(arrays, causal, at_once, monkeypatch):
    new, cache = arrays
    if not at_once:  # two queries at a time
        monkeypatch.setattr(attention, "MAX_SCORES", 2 * ROWS * HEADS * (CAPACITY + LENGTH))
    y = attention.attend(*map(jnp.asarray, new), cache, Span(jnp.asarray(START), jnp.asarray(COUNT), causal))
    assert np.isfinite(y).all()
    for row, t, head, expected in plain(new, cache, causal):
        np.testing.assert_allclose(y[row, t, head], expected, rtol=1e-5, atol=1e-5)


def test_append_writes_real_positions_alone(arrays):
    """Padding past the capacity must not be clamped onto real entries either."""
    (_, key, value), cache = arrays
    start, count = np.array([1, 6]), np.array([5, 1])
    cache = jax.tree.map(jnp.asarray, cache)
    after = attention.append(cache, key, value, Span(jnp.asarray(start), jnp.asarray(count)))
    for row in range(ROWS):
        expected = np.array(cache.key[row])
        expected[:, start[row] : start[row] + count[row]] = key[row, : count[row]].swapaxes(0, 1)
        np.testing.assert_array_equal(after.key[row], expected)

"""Which positions of a block are masked."""

import jax
import jax.numpy as jnp

from twotower_jax.training.config import Times


def draw_times(key: jax.Array, shape: tuple[int, int], times: Times) -> jax.Array:
    """t in [0, 1) for (B, M) blocks: each for itself, or one from each of B M equal parts of the interval, shuffled."""
    if times == "uniform":
        return jax.random.uniform(key, shape)
    count = shape[0] * shape[1]
    within, order = jax.random.split(key)
    parts = (jnp.arange(count) + jax.random.uniform(within, (count,))) / count
    return jax.random.permutation(order, parts).reshape(shape)


def draw_masks(key: jax.Array, t: jax.Array, size: int) -> jax.Array:
    """Masks (B, M, S): every position with probability t (B, M) (the linear schedule), and one at least."""
    draws = jax.random.uniform(key, (*t.shape, size))
    return (draws < t[..., None]) | (draws == draws.min(-1, keepdims=True))

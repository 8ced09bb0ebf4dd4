"""When a row ends."""

import jax
import jax.numpy as jnp


def holds(tokens: jax.Array, ids: jax.Array) -> jax.Array:
    """Whether each row of tokens (B, L) holds one of ids (n,): (B,) bool."""
    return (tokens[..., None] == ids).any(axis=(1, 2))


def broken(logits: jax.Array) -> jax.Array:
    """Whether a row of logits (B, L, V) holds a value that is not finite: (B,) bool. Such a row ends with an error."""
    return ~jnp.isfinite(logits).all(axis=(1, 2))

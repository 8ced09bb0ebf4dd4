"""When a row ends."""

import jax
import jax.numpy as jnp

from twotower_jax.decoding.vocabulary import Vocabulary


def holds(tokens: jax.Array, ids: jax.Array) -> jax.Array:
    """Whether each row of tokens (B, L) holds one of ids (n,): (B,) bool."""
    return (tokens[..., None] == ids).any(axis=(1, 2))


def broken(logits: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    """Whether a row of logits (B, L, V) holds a value that is not finite: (B,) bool. Such a row ends with an error."""
    return vocabulary.any(~jnp.isfinite(logits)).any(-1)

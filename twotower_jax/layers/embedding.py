"""Token embeddings, of a vocabulary that several devices may share."""

import jax
import jax.numpy as jnp

from twotower_jax.config import Config
from twotower_jax.layers.collectives import tensor_index, tensor_sum


def embed(table: jax.Array, tokens: jax.Array, c: Config) -> jax.Array:
    """table (V, D) and tokens (B, L) int32 of the whole vocabulary -> (B, L, D)."""
    if c.shards.tensor == 1:
        return table[tokens]
    place = tokens - tensor_index(c) * c.vocab_size
    here = (place >= 0) & (place < c.vocab_size)
    return tensor_sum(jnp.where(here[..., None], table[jnp.clip(place, 0, c.vocab_size - 1)], 0), c)

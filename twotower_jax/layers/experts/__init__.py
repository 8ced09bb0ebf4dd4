"""The products of tokens with the experts that they chose. No token is dropped."""

import jax
import jax.numpy as jnp

from twotower_jax.layers.experts.chosen import in_tiles, picked
from twotower_jax.layers.experts.dense import TOKENS_AT_ONCE, in_pieces, together
from twotower_jax.layers.linear import apart


def routed(x: jax.Array, experts: jax.Array, weights: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """The weighted sum of the chosen experts' outputs, by the way that moves the fewest bytes for so many tokens.

    Args:
      x: (tokens, D).
      experts: (tokens, k) int32; E stands for an expert that is not here, whose weight is 0.
      weights: (tokens, k) float32.
      up: (E, F, D).
      down: (E, F, D).

    Returns:
      (tokens, D) float32.
    """
    x = apart(x)
    tokens, total = x.shape[0], up.shape[0]
    if 3 * experts.size <= total:  # a picked expert is read, written and read again
        return picked(x, experts, weights, up, down)
    if tokens <= TOKENS_AT_ONCE:
        return together(x, experts, weights, up, down)
    return jax.lax.platform_dependent(x, experts, weights, up, down, cpu=in_tiles, default=in_pieces)

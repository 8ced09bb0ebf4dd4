"""The products of tokens with the experts that they chose. No token is dropped."""

import jax

from twotower_jax.layers.experts import quantized
from twotower_jax.layers.experts.chosen import in_tiles, picked
from twotower_jax.layers.experts.dense import TOKENS_AT_ONCE, in_pieces, together
from twotower_jax.layers.linear import apart
from twotower_jax.layers.quantized import Quantized


def routed(
    x: jax.Array, experts: jax.Array, weights: jax.Array, up: jax.Array | Quantized, down: jax.Array | Quantized
) -> jax.Array:
    """The weighted sum of the chosen experts' outputs, by the way that moves the fewest bytes for so many tokens.

    Args:
      x: (tokens, D).
      experts: (tokens, k) int32; E stands for an expert that is not here, whose weight is 0.
      weights: (tokens, k) float32.
      up: (E, F, D), quantised if `down` is.
      down: (E, F, D).

    Returns:
      (tokens, D) float32.
    """
    x = apart(x)
    if isinstance(up, Quantized):
        return quantized.routed(x, experts, weights, up, down)
    tokens, total = x.shape[0], up.shape[0]
    if 3 * experts.size <= total:  # a picked expert is read, written and read again
        return picked(x, experts, weights, up, down)
    if tokens <= TOKENS_AT_ONCE:
        return together(x, experts, weights, up, down)
    return jax.lax.platform_dependent(x, experts, weights, up, down, cpu=in_tiles, default=in_pieces)

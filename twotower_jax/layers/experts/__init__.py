"""The products of tokens with the experts that they chose. No token is dropped."""

import jax

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
    return jax.lax.platform_dependent(apart(x), experts, weights, up, down, cpu=_on_cpu, default=_elsewhere)


def _on_cpu(x, experts, weights, up, down):
    tokens, total = x.shape[0], up.shape[0]
    if 2 * experts.size <= total:
        return in_tiles(1, x, experts, weights, up, down)
    if tokens <= 32:
        return together(x, experts, weights, up, down)
    even = experts.size // total  # tokens of an expert, were the router even
    return in_tiles(min(max(16, 1 << even.bit_length() - 1), 128), x, experts, weights, up, down)


def _elsewhere(x, experts, weights, up, down):
    if 3 * experts.size <= up.shape[0]:  # a picked expert is read, written and read again
        return picked(x, experts, weights, up, down)
    return (together if x.shape[0] <= TOKENS_AT_ONCE else in_pieces)(x, experts, weights, up, down)

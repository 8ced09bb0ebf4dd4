"""The products of tokens with the experts that they chose. No token is dropped."""

import functools
from collections.abc import Callable

import jax

from twotower_jax.errors import InputError
from twotower_jax.layers.experts import quantized
from twotower_jax.layers.experts.chosen import in_tiles, picked
from twotower_jax.layers.experts.dense import TOKENS_AT_ONCE, in_pieces, together
from twotower_jax.layers.experts.grouped import grouped
from twotower_jax.layers.experts.megablox import Megablox
from twotower_jax.layers.experts.triton import Triton
from twotower_jax.layers.linear import apart
from twotower_jax.layers.quantized import Quantized

by_triton = functools.partial(grouped, Triton())
by_megablox = functools.partial(grouped, Megablox())

# The ways that there are, and where one is for certain platforms alone, these.
WAYS: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "picked": (picked, ()),
    "together": (together, ()),
    "in_pieces": (in_pieces, ()),
    "in_tiles": (in_tiles, ()),
    "triton": (by_triton, ("cuda", "gpu")),
    "megablox": (by_megablox, ("tpu",)),
}


def way(name: str, platform: str) -> Callable:
    """What does as `routed` does, by one of `WAYS`.

    Raises:
      InputError: there is none of this name, or it does not run on the platform.
    """
    if name not in WAYS:
        raise InputError(f"experts by {name!r}: known are {', '.join(WAYS)}")
    function, platforms = WAYS[name]
    if platforms and platform not in platforms:
        raise InputError(f"experts by {name!r} run on {platforms[0]}, not on {platform}")
    return function


def routed(
    x: jax.Array, experts: jax.Array, weights: jax.Array, up: jax.Array | Quantized, down: jax.Array | Quantized
) -> jax.Array:
    """The weighted sum of the chosen experts' outputs, by the way that moves the fewest bytes for so many tokens.

    Everywhere the chosen experts are read and no others, once for a tile of tokens, by kernels on NVIDIA GPUs and TPUs
    and by a loop on CPUs: at no size does another way move fewer bytes or multiply less.

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
        ways = {"cpu": in_tiles, "cuda": by_triton, "default": quantized.routed}
    else:
        ways = {"cpu": in_tiles, "cuda": by_triton, "tpu": by_megablox, "default": _without_kernels}
    return jax.lax.platform_dependent(x, experts, weights, up, down, **ways)


def _without_kernels(x, experts, weights, up, down):
    if 3 * experts.size <= up.shape[0]:  # a picked expert is read, written and read again
        return picked(x, experts, weights, up, down)
    return (together if x.shape[0] <= TOKENS_AT_ONCE else in_pieces)(x, experts, weights, up, down)

"""The products of tokens with the experts that they chose. No token is dropped."""

import jax
import jax.numpy as jnp

from twotower_jax.layers import mlp
from twotower_jax.layers.linear import apart, einsum

# Up to here one product over all experts; beyond it its (E, tokens, F) activations would take too much memory.
TOKENS_AT_ONCE = 1024

TILE = 128  # tokens of one expert that a CPU multiplies together


def routed(x: jax.Array, experts: jax.Array, weights: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """The weighted sum of the chosen experts' outputs, by the way that moves the fewest bytes for so many tokens.

    Args:
      x: (tokens, D).
      experts: (tokens, k) int32; E stands for an expert that is not here, whose weight is 0.
      weights: (tokens, k) float32.
      up: (E, D, F).
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


def picked(x, experts, weights, up, down):
    """The chosen experts alone."""
    hidden = mlp.relu2(einsum("td,tkdf->tkf", x, up[experts], out=jnp.float32)) * weights[..., None]
    return einsum("tkf,tkfd->td", hidden.astype(x.dtype), down[experts], out=jnp.float32)


def _spread(experts, weights, total):
    """Weights (tokens, E), 0 for those not chosen."""
    tokens = experts.shape[0]
    return jnp.zeros((tokens, total)).at[jnp.arange(tokens)[:, None], experts].set(weights)


def together(x, experts, weights, up, down):
    """All experts in one product."""
    weights = _spread(experts, weights, up.shape[0])
    hidden = mlp.relu2(einsum("td,edf->etf", x, up))  # this order of letters lets the weights lie as they are
    hidden *= weights.T[..., None].astype(x.dtype)
    return einsum("etf,efd->td", hidden, down, out=jnp.float32)


def in_pieces(x, experts, weights, up, down):
    """All experts, for `TOKENS_AT_ONCE` tokens after the other."""
    tokens = x.shape[0]

    def pieces(z):
        z = jnp.pad(z, ((0, -tokens % TOKENS_AT_ONCE), (0, 0)))
        return z.reshape(-1, TOKENS_AT_ONCE, z.shape[1])

    y = jax.lax.map(lambda piece: together(*piece, up, down), tuple(map(pieces, (x, experts, weights))))
    return y.reshape(-1, x.shape[1])[:tokens]


def in_tiles(x, experts, weights, up, down):
    """The chosen experts alone, for many tokens: sorted by expert, in tiles of one expert each."""
    (tokens, chosen), total = experts.shape, up.shape[0]
    count = tokens * chosen // TILE + total  # as many as are needed when every expert's last tile is nearly empty
    expert, order = jax.lax.sort_key_val(experts.reshape(-1), jnp.arange(tokens * chosen))
    load = jnp.zeros(total, jnp.int32).at[expert].add(1)
    tiles = -(-load // TILE)
    ends = jnp.cumsum(tiles)
    number = jnp.arange(tokens * chosen)
    place = (ends - tiles)[expert] * TILE + number - (jnp.cumsum(load) - load)[expert]
    place = jnp.where(expert < total, place, count * TILE + number)
    owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(count), side="right"), total - 1)
    tiled = jnp.zeros((count * TILE, x.shape[1]), x.dtype).at[place].set(x[order // chosen], unique_indices=True)
    hidden = mlp.relu2(einsum("ntd,ndf->ntf", tiled.reshape(count, TILE, -1), up[owner]))
    out = einsum("ntf,nfd->ntd", hidden, down[owner], out=jnp.float32).reshape(count * TILE, -1)
    out = out[place] * weights.reshape(-1)[order][:, None]
    return jnp.zeros(x.shape, jnp.float32).at[order // chosen].add(out)

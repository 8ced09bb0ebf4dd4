"""The chosen experts alone."""

import jax
import jax.numpy as jnp

from twotower_jax.layers import mlp
from twotower_jax.layers.linear import einsum

TILE = 128  # tokens of one expert that a CPU multiplies together


def picked(x, experts, weights, up, down):
    """The chosen experts alone."""
    hidden = mlp.relu2(einsum("td,tkfd->tkf", x, up[experts], out=jnp.float32)) * weights[..., None]
    return einsum("tkf,tkfd->td", hidden.astype(x.dtype), down[experts], out=jnp.float32)


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
    hidden = mlp.relu2(einsum("ntd,nfd->ntf", tiled.reshape(count, TILE, -1), up[owner]))
    out = einsum("ntf,nfd->ntd", hidden, down[owner], out=jnp.float32).reshape(count * TILE, -1)
    out = out[place] * weights.reshape(-1)[order][:, None]
    return jnp.zeros(x.shape, jnp.float32).at[order // chosen].add(out)

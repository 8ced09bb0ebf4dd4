"""The chosen experts alone."""

import jax
import jax.numpy as jnp

from twotower_jax.layers import mlp
from twotower_jax.layers.experts.tiles import Sorted, by_expert
from twotower_jax.layers.linear import einsum
from twotower_jax.layers.quantized import Quantized


def picked(x, experts, weights, up, down):
    """Each token by its own copy of its experts."""
    hidden = mlp.relu2(einsum("td,tkfd->tkf", x, up[experts], out=jnp.float32)) * weights[..., None]
    return einsum("tkf,tkfd->td", hidden.astype(x.dtype), down[experts], out=jnp.float32)


def _sizes(experts: jax.Array, total: int) -> tuple[int, int]:
    """How many choices of an expert a CPU multiplies together, and with how many experts at a time: several give both
    cores and caches enough to do.
    """
    if 2 * experts.size <= total:
        return 1, 2
    even = experts.size // total
    return (4 if even < 4 else min(max(8, 1 << even.bit_length() - 2), 64)), 4


def _matrices(stacked: jax.Array | Quantized, experts: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Experts' own."""
    # Held back, or XLA would convert all experts to float32 before the loop.
    stacked, experts = jax.lax.optimization_barrier((stacked, experts))
    return stacked[experts].dequantized(dtype) if isinstance(stacked, Quantized) else stacked[experts]


@jax.custom_vjp
def in_tiles(x, experts, weights, up, down):
    """Tiles of choices of one expert, a few of them together, in a loop of as many turns as that takes."""
    size, together = _sizes(experts, up.shape[0])
    choices = by_expert(experts, up.shape[0])
    tiles, inputs = choices.tiles(size), _sorted(x, choices, experts.shape[1], size)
    expert, start = (jnp.pad(z, (0, -z.size % together)) for z in (tiles.expert, tiles.start))
    start = jnp.where(jnp.arange(start.size) < tiles.count, start, experts.size)  # of empty ones behind all

    def turn(i, out):
        own, places = (jax.lax.dynamic_slice_in_dim(z, i * together, together) for z in (expert, start))
        rows = inputs[places[:, None] + jnp.arange(size)]
        # The weights come first and nothing is transposed: what comes second is repacked.
        hidden = mlp.relu2(einsum("pfd,ptd->pft", _matrices(up, own, x.dtype), rows))
        y = einsum("pft,pfd->ptd", hidden, _matrices(down, own, x.dtype), out=jnp.float32)
        for place, tile in zip(places, y, strict=True):  # what comes next overwrites padding
            out = jax.lax.dynamic_update_slice_in_dim(out, tile, place, axis=0)
        return out

    turns = -(-tiles.count // together)
    out = jax.lax.fori_loop(0, turns, turn, jnp.zeros(inputs.shape, jnp.float32))
    return einsum("tkd,tk->td", _by_token(out, choices, experts), weights)


def _sorted(x: jax.Array, choices: Sorted, chosen: int, size: int) -> jax.Array:
    """Each choice's row of x, in their order, and `size` rows of padding."""
    return jnp.pad(x[choices.order // chosen], ((0, size), (0, 0)))


def _by_token(rows: jax.Array, choices: Sorted, experts: jax.Array) -> jax.Array:
    """Rows (n + padding, ...) of sorted choices as (tokens, k, ...)."""
    place = jnp.zeros_like(choices.order).at[choices.order].set(jnp.arange(experts.size), unique_indices=True)
    return rows[place].reshape(*experts.shape, *rows.shape[1:])


def _forward(*arrays):
    return in_tiles(*arrays), arrays


def _backward(arrays, dy):
    x, experts, weights, up, down = arrays
    chosen = experts.shape[1]
    # Larger tiles than forward: each adds to the gradient of its expert, as large as that itself.
    size, choices = 2 * _sizes(experts, up.shape[0])[0], by_expert(experts, up.shape[0])
    tiles = choices.tiles(size)
    inputs, upstream = (_sorted(z, choices, chosen, size) for z in (x, dy.astype(x.dtype)))
    weight = jnp.pad(weights.reshape(-1)[choices.order], (0, size))

    def turn(i, carry):
        dx, dweight, dup, ddown = carry
        expert, start = tiles.expert[i], tiles.start[i]
        real = (start + jnp.arange(size) < tiles.stop[i])[:, None]

        def tile(z):
            return jax.lax.dynamic_slice_in_dim(z, start, size)

        own_up, own_down = (_matrices(stacked, expert, x.dtype) for stacked in (up, down))

        rows, above = tile(inputs), jnp.where(real, tile(upstream), 0)
        before = einsum("fd,td->tf", own_up, rows)
        hidden = mlp.relu2(before)
        back = einsum("fd,td->tf", own_down, above, out=jnp.float32)
        dbefore = (back * tile(weight)[:, None] * 2 * jax.nn.relu(before)).astype(x.dtype)
        weighted = (above * tile(weight)[:, None]).astype(x.dtype)
        dx = jax.lax.dynamic_update_slice_in_dim(dx, einsum("tf,fd->td", dbefore, own_up), start, axis=0)
        dweight = jax.lax.dynamic_update_slice_in_dim(dweight, (back * hidden).sum(-1), start, axis=0)
        dup = dup.at[expert].add(einsum("tf,td->fd", dbefore, rows, out=jnp.float32))
        ddown = ddown.at[expert].add(einsum("tf,td->fd", hidden, weighted, out=jnp.float32))
        return dx, dweight, dup, ddown

    none = (jnp.zeros(z.shape, jnp.float32) for z in (weight, up, down))
    dx, dweight, dup, ddown = jax.lax.fori_loop(0, tiles.count, turn, (jnp.zeros_like(inputs), *none))
    here = experts < up.shape[0]
    return (
        jnp.where(here[..., None], _by_token(dx, choices, experts), 0).sum(1),
        None,
        jnp.where(here, _by_token(dweight, choices, experts), 0),
        dup.astype(up.dtype),
        ddown.astype(down.dtype),
    )


in_tiles.defvjp(_forward, _backward)

"""The chosen experts alone."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from twotower_jax.layers import mlp
from twotower_jax.layers.linear import einsum


def picked(x, experts, weights, up, down):
    """Each token by its own copy of its experts."""
    hidden = mlp.relu2(einsum("td,tkfd->tkf", x, up[experts], out=jnp.float32)) * weights[..., None]
    return einsum("tkf,tkfd->td", hidden.astype(x.dtype), down[experts], out=jnp.float32)


class Tiles(NamedTuple):
    """Pairs of a token and an expert, n of them, by expert.

    Attributes:
      order: (n,) int32, the pairs' numbers, sorted.
      place: (n,) int32, where each pair stands in that order.
      expert: (most,) int32, of each tile.
      start: (most,) int32, where a tile's pairs begin.
      end: (most,) int32, where they end, at most `size` later.
      count: () int32, tiles that there are.
    """

    order: jax.Array
    place: jax.Array
    expert: jax.Array
    start: jax.Array
    end: jax.Array
    count: jax.Array


def tiles(experts: jax.Array, total: int, size: int) -> Tiles:
    """The tiles of up to `size` pairs for experts (tokens, k) of `total`; those that are not here have none."""
    chosen = experts.reshape(-1)
    numbers = jnp.arange(chosen.size)
    order = jnp.argsort(chosen, stable=True)
    load = jnp.zeros(total, jnp.int32).at[chosen].add(1, mode="drop")
    begin = jnp.cumsum(load) - load
    ends = jnp.cumsum(-(-load // size))  # of each expert's tiles
    tile = jnp.arange(chosen.size // size + min(total, chosen.size))  # as many as there can be
    expert = jnp.minimum((ends <= tile[:, None]).sum(-1), total - 1)
    start = begin[expert] + (tile - ends[expert] + -(-load // size)[expert]) * size
    end = jnp.minimum(start + size, (begin + load)[expert])
    return Tiles(order, jnp.zeros_like(order).at[order].set(numbers), expert, start, end, ends[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def in_tiles(size: int, x, experts, weights, up, down):
    """Tiles of one expert and up to `size` tokens, one after the other, in a loop of as many turns as there are tiles.

    Outputs are summed in the order in which a token chose, whatever the others chose.
    """
    t = tiles(experts, up.shape[0], size)
    inputs = _sorted(x, t, experts.shape[1], size)

    def turn(i, out):
        rows = jax.lax.dynamic_slice_in_dim(inputs, t.start[i], size)
        hidden = mlp.relu2(einsum("fd,td->tf", up[t.expert[i]], rows))
        y = einsum("tf,fd->td", hidden, down[t.expert[i]], out=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(out, y, t.start[i], axis=0)  # the next tiles write over its padding

    out = jax.lax.fori_loop(0, t.count, turn, jnp.zeros(inputs.shape, jnp.float32))
    return einsum("tkd,tk->td", out[t.place].reshape(*weights.shape, -1), weights)


def _sorted(x, t: Tiles, chosen: int, size: int):
    """Each pair's row of x, in the tiles' order, and `size` rows of padding."""
    return jnp.pad(x[t.order // chosen], ((0, size), (0, 0)))


def _forward(size, x, experts, weights, up, down):
    return in_tiles(size, x, experts, weights, up, down), (x, experts, weights, up, down)


def _backward(size, saved, dy):
    x, experts, weights, up, down = saved
    chosen = experts.shape[1]
    t = tiles(experts, up.shape[0], size)
    inputs, upstream = _sorted(x, t, chosen, size), _sorted(dy.astype(x.dtype), t, chosen, size)
    weight = jnp.pad(weights.reshape(-1)[t.order], (0, size))

    def turn(i, carry):
        dx, dweight, dup, ddown = carry
        expert, start = t.expert[i], t.start[i]
        real = (start + jnp.arange(size) < t.end[i])[:, None]

        def tile(z):
            return jax.lax.dynamic_slice_in_dim(z, start, size)

        rows, above = tile(inputs), jnp.where(real, tile(upstream), 0)
        before = einsum("fd,td->tf", up[expert], rows)
        hidden = mlp.relu2(before)
        back = einsum("fd,td->tf", down[expert], above, out=jnp.float32)
        own = (back * hidden).sum(-1)
        dhidden = back * tile(weight)[:, None]
        dbefore = (dhidden * 2 * jax.nn.relu(before)).astype(x.dtype)
        weighted = (above * tile(weight)[:, None]).astype(x.dtype)
        dx = jax.lax.dynamic_update_slice_in_dim(dx, einsum("tf,fd->td", dbefore, up[expert]), start, axis=0)
        dweight = jax.lax.dynamic_update_slice_in_dim(dweight, own, start, axis=0)
        dup = dup.at[expert].add(einsum("tf,td->fd", dbefore, rows, out=jnp.float32))
        ddown = ddown.at[expert].add(einsum("tf,td->fd", hidden, weighted, out=jnp.float32))
        return dx, dweight, dup, ddown

    shapes = (inputs, jnp.zeros(weight.shape, jnp.float32), *(jnp.zeros(w.shape, jnp.float32) for w in (up, down)))
    dx, dweight, dup, ddown = jax.lax.fori_loop(0, t.count, turn, tuple(map(jnp.zeros_like, shapes)))
    dx = dx[t.place].reshape(*experts.shape, -1).sum(1)
    return dx, None, dweight[t.place].reshape(weights.shape), dup.astype(up.dtype), ddown.astype(down.dtype)


in_tiles.defvjp(_forward, _backward)

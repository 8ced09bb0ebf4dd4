"""Quantised experts. No copy of all of a layer's experts is made in a larger dtype."""

import math

import jax
import jax.numpy as jnp

from twotower_jax.layers import mlp
from twotower_jax.layers.experts import dense
from twotower_jax.layers.linear import einsum
from twotower_jax.layers.quantized import Quantized

TILE = 128  # tokens of one expert that a CPU multiplies together
TOKENS_AT_ONCE = 256  # which keep a GPU at work; for more, activations of all experts would take more than the weights
EXPERTS_AT_ONCE = 4  # that are dequantised together: of the released model 40 MB in bfloat16, which a cache can hold


def routed(x, experts, weights, up: Quantized, down: Quantized):
    """`experts.routed` of quantised experts."""
    few = 5 * experts.size <= up.shape[0]  # a picked expert is read, written and read again, in two bytes a number
    default = picked if few else in_pieces
    return jax.lax.platform_dependent(x, experts, weights, up, down, cpu=in_tiles, default=default)


def picked(x, experts, weights, up, down):
    """The chosen experts alone, for few tokens."""
    hidden = mlp.relu2(einsum("td,tkfd->tkf", x, up[experts].dequantized(x.dtype), out=jnp.float32))
    hidden *= weights[..., None]
    return einsum("tkf,tkfd->td", hidden.astype(x.dtype), down[experts].dequantized(x.dtype), out=jnp.float32)


def in_pieces(x, experts, weights, up, down):
    """All experts, for `TOKENS_AT_ONCE` tokens after the other."""
    together = as_integers if up.group == x.shape[1] else in_turn
    if x.shape[0] <= TOKENS_AT_ONCE:
        return together(x, dense.spread(experts, weights, up.shape[0]), up, down)
    tokens = x.shape[0]

    def pieces(z):
        z = jnp.pad(z, ((0, -tokens % TOKENS_AT_ONCE), (0, 0)))
        return z.reshape(-1, TOKENS_AT_ONCE, z.shape[1])

    def one(piece):
        x, experts, weights = piece
        return together(x, dense.spread(experts, weights, up.shape[0]), up, down)

    return jax.lax.map(one, tuple(map(pieces, (x, experts, weights)))).reshape(-1, x.shape[1])[:tokens]


def as_integers(x, weights, up, down):
    """All experts (weights (tokens, E)) in one product of integers, if a channel has one scale: up's and down's are
    factors of what is between the products. XLA converts the integers as it multiplies.
    """
    hidden = einsum("td,efd->etf", x, up.values.astype(x.dtype), out=jnp.float32)
    hidden = mlp.relu2(hidden * up.scales[:, None, :, 0].astype(jnp.float32))
    hidden *= weights.T[..., None] * down.scales[:, None, :, 0].astype(jnp.float32)
    return einsum("etf,efd->td", hidden.astype(x.dtype), down.values.astype(x.dtype), out=jnp.float32)


def in_turn(x, weights, up, down):
    """All experts (weights (tokens, E)), `EXPERTS_AT_ONCE` dequantised after the other."""
    total = up.shape[0]
    count = math.gcd(total, EXPERTS_AT_ONCE)

    def some(y, experts):
        weights, up, down = experts
        hidden = mlp.relu2(einsum("td,efd->etf", x, up.dequantized(x.dtype), out=jnp.float32)) * weights[..., None]
        return y + einsum("etf,efd->td", hidden.astype(x.dtype), down.dequantized(x.dtype), out=jnp.float32), None

    split = jax.tree.map(lambda z: z.reshape(-1, count, *z.shape[1:]), (weights.T, up, down))
    return jax.lax.scan(some, jnp.zeros(x.shape, jnp.float32), split)[0]


def in_tiles(x, experts, weights, up, down):
    """The chosen experts alone, each dequantised for a tile of its tokens after the other."""
    (tokens, chosen), total = experts.shape, up.shape[0]
    size = min(TILE, tokens)
    expert, order = jax.lax.sort_key_val(experts.reshape(-1), jnp.arange(tokens * chosen))
    load = jnp.zeros(total, jnp.int32).at[expert].add(1)
    first = jnp.cumsum(load) - load
    tiles = -(-load // size)
    ends = jnp.cumsum(tiles)

    def tile(carry):
        number, y = carry
        e = jnp.searchsorted(ends, number, side="right")
        place = first[e] + (number - ends[e] + tiles[e]) * size + jnp.arange(size)
        choice = jnp.where(place < first[e] + load[e], order.at[place].get(mode="clip"), tokens * chosen)
        token = choice // chosen  # `tokens` for none
        hidden = einsum("td,fd->tf", x.at[token].get(mode="clip"), up[e].dequantized(x.dtype))
        out = einsum("tf,fd->td", mlp.relu2(hidden), down[e].dequantized(x.dtype), out=jnp.float32)
        out *= weights.reshape(-1).at[choice].get(mode="clip")[:, None]
        return number + 1, y.at[token].add(out, mode="drop")

    start = (jnp.zeros((), ends.dtype), jnp.zeros(x.shape, jnp.float32))
    return jax.lax.while_loop(lambda carry: carry[0] < ends[-1], tile, start)[1]

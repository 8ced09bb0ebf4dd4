"""Products of sorted choices with their experts' matrices on NVIDIA GPUs: Pallas kernels, by way of Triton.

A program multiplies the rows of one tile with some columns of its expert's matrix, which it reads where it lies; a tile
without rows costs nothing. Every row is summed in float32 and in one order, whatever other rows there are.

By Triton and not Mosaic GPU, since that compiles for GPUs that are not there, and for those before Hopper.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from twotower_jax.layers.experts.tiles import Unsorted, by_expert
from twotower_jax.layers.linear import HIGHEST


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a program multiplies at a time: (rows, depth) with (depth, columns), of 2-byte numbers."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By the mean number of choices of an expert. Few: bytes decide, so tiles of weights of 16 KB, three of them on their
# way: at one token of the released model 174 (up) and 252 (down) programs have 8 to 12 MB in flight, where bandwidth
# times latency is 3. Many: arithmetic decides, so as square as the registers allow. None was timed on a GPU yet.
TILES = {
    8: Tile(rows=16, columns=64, depth=128, warps=4, stages=4),
    16: Tile(rows=32, columns=64, depth=128, warps=4, stages=4),
    64: Tile(rows=64, columns=128, depth=128, warps=8, stages=3),
}
LARGEST = Tile(rows=128, columns=128, depth=64, warps=8, stages=4)


def tile_for(choices: int, experts: int) -> Tile:
    return next((tile for most, tile in TILES.items() if choices <= most * experts), LARGEST)


def _depth(tile: Tile, dtype: jnp.dtype) -> int:
    return tile.depth * 2 // dtype.itemsize


def _dot(a: jax.Array, b: jax.Array, contracted: tuple) -> jax.Array:
    precision = HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (contracted, ((), ())), precision, jnp.float32)


def _product(expert, start, stop, order, x, weights, y, *, tile, chosen, activation):
    """y = activation(x up^T) of tokens' rows x, if `chosen` of them have a token in common; otherwise x down."""
    column, number = pl.program_id(0) * tile.columns, pl.program_id(1)
    first, end = start[number], stop[number]
    summed, width, depth = x.shape[1], y.shape[1], _depth(tile, x.dtype)

    @pl.when(first < end)
    def _():
        e = expert[number]
        place = first + jnp.arange(tile.rows)
        real = place < end
        choice = plgpu.load(order.at[place], mask=real, other=order.shape[0])
        source, target = (choice // chosen, place) if chosen else (place, choice)
        columns = column + jnp.arange(tile.columns)

        def step(i, total):
            along = i * depth + jnp.arange(depth)
            there, here = pl.ds(i * depth, depth), pl.ds(column, tile.columns)
            mask = real[:, None] & (along < summed)[None]
            a = plgpu.load(x.at[source[:, None], along[None]], mask=mask, other=0)
            if chosen:
                mask = (columns < width)[:, None] & (along < summed)[None]
                b = plgpu.load(weights.at[e, here, there], mask=mask, other=0)
                return total + _dot(a, b, ((1,), (1,)))
            mask = (along < summed)[:, None] & (columns < width)[None]
            b = plgpu.load(weights.at[e, there, here], mask=mask, other=0)
            return total + _dot(a, b, ((1,), (0,)))

        total = jnp.zeros((tile.rows, tile.columns), jnp.float32)
        total = activation(jax.lax.fori_loop(0, pl.cdiv(summed, depth), step, total))
        mask = real[:, None] & (columns < width)[None]
        plgpu.store(y.at[target[:, None], columns[None]], total.astype(y.dtype), mask=mask)


def _outer(start, stop, order, h, x, y, *, tile, chosen):
    """y (E, F, D): each expert's sum, over its choices, of the products of their rows of h and their tokens' of x."""
    width, height, e = pl.program_id(0) * tile.columns, pl.program_id(1) * tile.rows, pl.program_id(2)
    first, end, depth = start[e], stop[e], _depth(tile, h.dtype)
    rows, columns = height + jnp.arange(tile.rows), width + jnp.arange(tile.columns)

    def step(i, total):
        place = first + i * depth + jnp.arange(depth)
        real = place < end
        token = plgpu.load(order.at[place], mask=real, other=0) // chosen
        mask = real[:, None] & (rows < h.shape[1])[None]
        a = plgpu.load(h.at[place[:, None], rows[None]], mask=mask, other=0)
        mask = real[:, None] & (columns < x.shape[1])[None]
        b = plgpu.load(x.at[token[:, None], columns[None]], mask=mask, other=0)
        return total + _dot(a, b, ((0,), (0,)))

    total = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(end - first, depth), step, total)
    mask = (rows < h.shape[1])[:, None] & (columns < x.shape[1])[None]
    here = (pl.ds(height, tile.rows), pl.ds(width, tile.columns))
    plgpu.store(y.at[e, *here], total.astype(y.dtype), mask=mask)


@dataclasses.dataclass(frozen=True)
class Triton:
    """`grouped.Kernels`; with `interpret` a CPU runs them, slowly."""

    interpret: bool = False

    def choices(self, experts, total):
        few = 3 * experts.size <= total  # of which at most every sixth is read twice
        return Unsorted(experts.reshape(-1), total) if few else by_expert(experts, total)

    def widen(self, x, up, choices, activation):
        chosen = choices.order.size // x.shape[0]
        return self._product(x, up, choices, (up.shape[1], x.dtype), chosen=chosen, activation=activation)

    def narrow(self, hidden, down, choices):
        return self._product(hidden, down, choices, (down.shape[2], jnp.float32), chosen=None, activation=lambda z: z)

    def outer(self, hidden, x, choices):
        tile, total, chosen = LARGEST, choices.stops.size, choices.order.size // x.shape[0]
        grid = (pl.cdiv(x.shape[1], tile.columns), pl.cdiv(hidden.shape[1], tile.rows), total)
        given = jax.ShapeDtypeStruct((total, hidden.shape[1], x.shape[1]), x.dtype)
        kernel = functools.partial(_outer, tile=tile, chosen=chosen)
        return self._run(kernel, grid, tile, given, choices.starts, choices.stops, choices.order, hidden, x)

    def _product(self, x, weights, choices, given, **options):
        tile, (width, dtype) = tile_for(choices.order.size, weights.shape[0]), given
        cut = choices.tiles(tile.rows)
        kernel = functools.partial(_product, tile=tile, **options)
        # A tile's programs stand together: its rows stay in the cache, and so does its expert for the next tile.
        grid = (pl.cdiv(width, tile.columns), cut.expert.size)
        given = jax.ShapeDtypeStruct((choices.order.size, width), dtype)
        return self._run(kernel, grid, tile, given, cut.expert, cut.start, cut.stop, choices.order, x, weights)

    def _run(self, kernel, grid, tile, given, *arrays):
        parameters = plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
        call = pl.pallas_call(kernel, given, grid=grid, compiler_params=parameters, interpret=self.interpret)
        return call(*arrays)

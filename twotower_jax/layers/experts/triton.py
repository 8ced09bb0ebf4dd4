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
from twotower_jax.layers.quantized import Quantized


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


def _read(weights, e, channel, channels, number, numbers, dtype) -> list[jax.Array]:
    """The part (channels, numbers) of an expert's matrix that begins at (channel, number), an array for each number in
    a byte: of 4 bits the second one begins half a row later. What a tile has beyond the matrix is finite.
    """
    values, *scales = weights
    rows, columns = channel + jnp.arange(channels), number + jnp.arange(numbers)
    real, width = rows < values.shape[1], values.shape[2]
    mask = real[:, None] & (columns < width)[None]
    part = plgpu.load(values.at[e, pl.ds(channel, channels), pl.ds(number, numbers)], mask=mask, other=0)
    if not scales:
        return [part]
    parts = [part] if values.dtype == jnp.int8 else [(half & 15).astype(jnp.int8) - 8 for half in (part, part >> 4)]
    group = width * len(parts) // scales[0].shape[2]

    def scaled(part, offset):
        if group % numbers == 0:  # all of one group
            scale = plgpu.load(scales[0].at[e, rows, (number + offset) // group], mask=real, other=0)[:, None]
        else:
            scale = scales[0].at[e, rows[:, None], ((columns + offset) // group)[None]]
            scale = plgpu.load(scale, mask=mask, other=0)
        return part.astype(dtype) * scale.astype(dtype)

    return [scaled(part, n * width) for n, part in enumerate(parts)]


def _product(expert, start, stop, order, x, *arrays, tile, chosen, activation):
    """y = activation(x up^T) of tokens' rows x, if `chosen` of them have a token in common; otherwise x down."""
    *weights, y = arrays
    column, number = pl.program_id(0) * tile.columns, pl.program_id(1)
    first, end = start[number], stop[number]
    depth, width = _depth(tile, x.dtype), weights[0].shape[2]

    @pl.when(first < end)
    def _():
        e = expert[number]
        place = first + jnp.arange(tile.rows)
        real = place < end
        choice = plgpu.load(order.at[place], mask=real, other=order.shape[0])
        source, target = (choice // chosen, place) if chosen else (place, choice)
        columns = column + jnp.arange(tile.columns)

        def rows_of_x(begin, offset, size):
            along = begin + jnp.arange(depth)
            mask = real[:, None] & (along < size)[None]
            return plgpu.load(x.at[source[:, None], (along + offset)[None]], mask=mask, other=0)

        def up(i, total):
            parts = _read(weights, e, column, tile.columns, i * depth, depth, x.dtype)
            for n, part in enumerate(parts):
                total += _dot(rows_of_x(i * depth, n * width, width), part, ((1,), (1,)))
            return total

        def down(i, totals):
            a = rows_of_x(i * depth, 0, x.shape[1])
            parts = _read(weights, e, i * depth, depth, column, tile.columns, x.dtype)
            return tuple(total + _dot(a, part, ((1,), (0,))) for total, part in zip(totals, parts, strict=True))

        total = jnp.zeros((tile.rows, tile.columns), jnp.float32)
        if chosen:
            totals, size = (jax.lax.fori_loop(0, pl.cdiv(width, depth), up, total),), y.shape[1]
        else:
            totals, size = (total,) * (y.shape[1] // width), width
            totals = jax.lax.fori_loop(0, pl.cdiv(x.shape[1], depth), down, totals)
        mask = real[:, None] & (columns < size)[None]
        for n, total in enumerate(totals):
            there = y.at[target[:, None], (columns + n * width)[None]]
            plgpu.store(there, activation(total).astype(y.dtype), mask=mask)


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


def _within_groups(tile: Tile, weights: Quantized, dtype: jnp.dtype) -> Tile:
    """Such that numbers that are read together have one scale, where groups are of 16 or a larger power of 2."""
    most = weights.group & -weights.group
    if most < 16:
        return tile
    depth = min(_depth(tile, dtype), most) * dtype.itemsize // 2
    return dataclasses.replace(tile, columns=min(tile.columns, most), depth=depth)


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
        (width, dtype), count = given, choices.order.size
        tile, parts, bytes_wide = tile_for(count, weights.shape[0]), [weights], width
        if isinstance(weights, Quantized):
            parts = [weights.values, weights.scales]
            tile = _within_groups(tile, weights, x.dtype)
            if not options["chosen"]:
                bytes_wide = weights.values.shape[2]
        cut = choices.tiles(tile.rows)
        kernel = functools.partial(_product, tile=tile, **options)
        # A tile's programs stand together: its rows stay in the cache, and so does its expert for the next tile.
        grid = (pl.cdiv(bytes_wide, tile.columns), cut.expert.size)
        given = jax.ShapeDtypeStruct((count, width), dtype)
        return self._run(kernel, grid, tile, given, cut.expert, cut.start, cut.stop, choices.order, x, *parts)

    def _run(self, kernel, grid, tile, given, *arrays):
        parameters = plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages)
        call = pl.pallas_call(kernel, given, grid=grid, compiler_params=parameters, interpret=self.interpret)
        return call(*arrays)

"""How many rows the engine has room for, and how they are shared out."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from twotower_jax import inputs, memory
from twotower_jax.errors import InputError
from twotower_jax.placement import Group, Towers
from twotower_jax.state import state_bytes
from twotower_jax.two_tower import PREFILL_TOKENS

SLOTS = {"cpu": 16}  # more gain nothing there
OTHER_SLOTS = 64
USABLE = 0.9  # of what is free; the rest is for what programs need besides
BENCH = 0.25  # of the slots, rows that wait beside them


def lanes_of(towers: Towers, slots: int, capacity: int) -> tuple[int, int, int]:
    """How the engine shares out its slots: how many lanes it has, and of each the slots and the rows that wait."""
    shards = towers.context.row_shards
    lanes = 2 if towers.split else 1
    each = -(-slots // (lanes * shards))
    return lanes, each * shards, _bench_of(each, capacity) * shards


def _bench_of(slots: int, capacity: int) -> int:
    """More where rows are short: a pass may read the prompts of many, and their states are small."""
    return max(math.ceil(BENCH * slots), min(slots, 2 * PREFILL_TOKENS // capacity))


def piece_of(bench: int, longest: int) -> int:
    """Tokens that are read at once of each prompt on the bench, of which the longest has so many left: one of few
    numbers, so that few programs are compiled.
    """
    most = max(16, PREFILL_TOKENS // bench)
    width = 16
    while width < min(longest, most):
        width *= 4
    return min(width, 1 << (most.bit_length() - 1))


def capacity_of(longest: int) -> int:
    """Positions of a slot for requests of so many: one of few numbers, so that few programs are compiled."""
    return max(64, inputs.bucket(longest))


def block_of(block_size: int) -> int:
    """The block of slots for requests with blocks of so many positions: one of few numbers, too."""
    return max(16, 1 << max(0, block_size - 1).bit_length())


def rows_bytes(group: Group, rows: int, capacity: int, block_size: int, dtype: jnp.dtype) -> int:
    """Of so many slots on one device: their states and those of the rows that wait, and what a pass makes of blocks."""
    c = group.config
    scores = c.attention_heads * (capacity + block_size)  # float32, and their exponentials
    logits = 3 * c.vocab_size  # float32: logits, probabilities and one more
    states = state_bytes(c, rows + _bench_of(rows, capacity), capacity, dtype)
    return states + rows * 4 * block_size * (2 * scores + logits)


def longest(towers: Towers, dtype: jnp.dtype, block_size: int, room: int | None = None) -> int:
    """The positions that a single row can have."""
    free = _free(towers) if room is None else room
    return _most(lambda n: rows_bytes(towers.context, 1, capacity_of(n), block_size, dtype) <= free)


def fitting(towers: Towers, needed: Callable[[int], int]) -> tuple[int, int]:
    """The largest number, of rows or positions, that needs no more bytes of a device than may be used; and these."""
    free = _free(towers)
    return _most(lambda n: needed(n) <= free), free


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, if all below do; 0 if none does."""
    low, high = 0, 2**31
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _free(towers: Towers) -> int:
    free = min(memory.free_bytes(device) for group in towers.groups for device in group.local_devices)
    if jax.process_count() > 1:  # all must come to the same
        free = int(multihost_utils.process_allgather(np.float64(free)).min())
    return int(USABLE * free)


def plan(
    towers: Towers,
    dtype: jnp.dtype,
    *,
    longest: int,
    block_size: int,
    waiting: int | None = None,
    slots: int | None = None,
    room: int | None = None,
) -> tuple[int, int, str]:
    """The number of slots, the positions of each, and both in one line.

    Args:
      towers: their devices.
      dtype: of the model.
      longest: positions of the longest request.
      block_size: the largest.
      waiting: requests, if it is known; not many more slots are made.
      slots: that are asked for.
      room: bytes of a device that may be used; what is free by default.

    Raises:
      InputError: they do not fit.
    """
    capacity = capacity_of(longest)
    group = towers.context
    one = rows_bytes(group, 1, capacity, block_size, dtype)
    free = _free(towers) if room is None else room
    fit = _most(lambda n: rows_bytes(group, n, capacity, block_size, dtype) <= free) * group.row_shards
    numbers = f"{one / 1e9:.3g} GB a row of {capacity} positions, {free / 1e9:.3g} GB of a device to use"
    if fit < 1 or capacity >= 2**31:
        raise InputError(f"not one row fits: {numbers}")
    if slots is not None and slots > fit:
        raise InputError(f"{slots} slots do not fit, {fit} would: {numbers}")
    most = SLOTS.get(jax.default_backend(), OTHER_SLOTS) * group.row_shards
    if waiting is not None:
        most = min(most, 1 << max(0, waiting - 1).bit_length())
    chosen = slots or min(most, fit)
    return chosen, capacity, f"{chosen} slots: {numbers}"

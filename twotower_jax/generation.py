"""A batch's generation on the devices of the towers.

Towers on the same devices: one program, which is all of the generation. Towers on devices of their own: programs that
the host starts in turn, ahead of the devices. The rows are in two halves, of which one is denoised while the other is
read; between the devices go what was written and what is new in the context's state.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twotower_jax import sharding, two_tower
from twotower_jax.config import Config
from twotower_jax.decoding import autoregressive, loop
from twotower_jax.decoding.loop import Writer
from twotower_jax.decoding.progress import Progress, Request, nothing_written
from twotower_jax.decoding.sampling import Sampler
from twotower_jax.layers.collectives import any_row
from twotower_jax.placement import Group, Towers
from twotower_jax.programs import Program, Programs
from twotower_jax.sharding import ROWS, WHOLE
from twotower_jax.state import TowerState, empty_state

REQUEST = Request(prompts=ROWS, count=ROWS, rows=ROWS, seed=WHOLE, eos=WHOLE, units=WHOLE)
PROGRESS = Progress(tokens=ROWS, unit=WHOLE, length=ROWS, forwards=ROWS, done=ROWS, failed=ROWS)
WRITTEN = (ROWS, ROWS, WHOLE)  # tokens, which rows are done, whether there is more to write (1,)


def _prefill(config: Config, params: dict, writer: Writer, request: Request, *, capacity: int):
    before = writer.read_before(request)
    _, state = two_tower.prefill(config, params, request.prompts, before, capacity)
    return state, two_tower.news(state, jnp.zeros_like(before), request.prompts.shape[1])


def _receive(config: Config, news: TowerState, *, capacity: int, dtype: jnp.dtype) -> TowerState:
    return two_tower.absorb(two_tower.caches(empty_state(config, news.length.shape[0], capacity, dtype)), news)


def _absorb(config: Config, caches: TowerState, news: TowerState) -> TowerState:
    return two_tower.absorb(caches, news)


def _write(config: Config, params: dict, writer: Writer, state: TowerState, p: Progress, request: Request):
    p, tokens = writer.write(config, params, state, p, request)
    return p, (tokens, p.done, ((p.unit < request.units) & any_row(~p.done, config))[None])


def _read(config: Config, params: dict, state: TowerState, tokens: jax.Array, done: jax.Array, more: jax.Array):
    after = loop.when(more[0], lambda state: loop.read(config, params, state, tokens, done), state)
    return after, two_tower.news(after, state.length, tokens.shape[1])


def bucket(length: int) -> int:
    """The next of few lengths, at most a quarter longer (or 16), so that few programs are compiled."""
    step = max(16, (1 << (length - 1).bit_length()) // 8) if length > 1 else 16
    return -(-length // step) * step


def sizes(longest: int, limit: int, unit: int) -> dict[str, int]:
    """What programs are compiled for: the `capacity` of a state, and the `room` for new tokens, of a run.

    Args:
      longest: tokens of the longest prompt.
      limit: new tokens of a row.
      unit: tokens that are written at a time.
    """
    room = -(-bucket(limit) // unit) * unit
    return {"capacity": bucket(longest + room), "room": room}


def fused(config: Config) -> Program:
    """All of a generation, by both towers."""
    return Program(loop.generate, (sharding.specs(config, "context", "denoiser"), WHOLE, REQUEST), PROGRESS)


def alone(config: Config) -> Program:
    """All of a generation, by the context tower."""
    return Program(autoregressive.generate, (sharding.specs(config, "context"), WHOLE, REQUEST), PROGRESS)


def apart(config: Config) -> dict[str, Program]:
    """The programs of towers on devices of their own: `prefill` and `read` of the context's, the denoiser's others.

    A state's Mamba part only moves; of the caches the context sends what is new, which the denoiser's copy absorbs.
    """
    states = sharding.state_spec(config)
    caches = two_tower.caches(states)
    context, denoiser = sharding.specs(config, "context"), sharding.specs(config, "denoiser")
    return {
        "prefill": Program(_prefill, (context, WHOLE, REQUEST), (states, caches)),
        "receive": Program(_receive, (caches,), caches),
        "absorb": Program(_absorb, (caches, caches), caches, donated=(0,)),
        "write": Program(_write, (denoiser, WHOLE, states, PROGRESS, REQUEST), (PROGRESS, WRITTEN)),
        "read": Program(_read, (context, states, *WRITTEN), (states, caches), donated=(1,)),
    }


def generate(
    towers: Towers,
    programs: Programs,
    params: dict,
    rules: Writer | Sampler,
    request: Request,
    what: str,
    *,
    capacity: int,
    room: int,
) -> Progress:
    """The new tokens of a batch.

    Args:
      towers: their devices.
      programs: those that are compiled already, and will be.
      params: parameters, on the devices.
      rules: a writer for the denoiser, or a sampler for AR; on the host.
      request: the batch, on the host.
      what: the work, for the message if there is no room for it.
      capacity: tokens that the context's state has room for.
      room: new tokens that the result has room for.

    Returns:
      progress, on the host.
    """
    sizes = {"capacity": capacity, "room": room}
    if isinstance(rules, Sampler):
        own = {"context": params["context"]}
        return _at_once(towers.context, programs, alone(towers.context.whole), own, rules, request, what, **sizes)
    if towers.split:
        return _in_turn(towers, programs, params, rules, request, what, **sizes)
    return _at_once(towers.context, programs, fused(towers.context.whole), params, rules, request, what, **sizes)


def _at_once(
    group: Group, programs: Programs, program: Program, params: dict, rules: Any, request: Request, what: str, **sizes
) -> Progress:
    """All of a generation as one program."""
    rows = request.count.shape[0]
    arrays = (group.put(rules, WHOLE), group.put(_padded(request, group.row_shards), REQUEST))
    progress = group.fetch(programs.run(group, program, params, *arrays, what=what, **sizes))
    return jax.tree.map(lambda x: x[:rows] if x.ndim else x, progress)


@dataclasses.dataclass
class _Half:
    """Rows on both groups of devices.

    Attributes:
      request, progress, copy: on the denoiser's devices; `copy` is its copy of the context's state.
      state: the context's state, on its devices.
      news: what is new in its caches, there; None if the copy has it.
      more: for each unit that was started, whether another is to follow, on all devices.
    """

    request: Request
    progress: Progress
    copy: TowerState
    state: TowerState
    news: TowerState | None
    more: list[list[jax.Array]]

    def ended(self) -> bool:
        """Whether the unit before the newest was the last: what the host knows without waiting for the newest."""
        if len(self.more) < 2:
            return False
        here = next(shard for array in self.more[-2] for shard in array.addressable_shards)
        return not np.asarray(here.data)[0]


def _in_turn(
    towers: Towers, programs: Programs, params: dict, writer: Writer, request: Request, what: str, capacity, room
) -> Progress:
    """`loop.generate` with a group of devices for each tower."""
    context, denoiser = towers.context, towers.denoiser
    rows, shards = request.count.shape[0], context.row_shards
    halves = 2 if rows > shards else 1
    request = _padded(request, halves * shards)
    program = apart(context.whole)
    states = sharding.state_spec(context.whole)
    own = {name: {name: params[name]} for name in params}
    there, here = (group.put(writer, WHOLE) for group in towers.groups)
    run = functools.partial(programs.run, what=what)

    def update(state: TowerState, news: TowerState, name: str, *caches: TowerState, **sizes: Any) -> TowerState:
        """The denoiser's copy of the context's state."""
        moved = towers.move(two_tower.with_mamba(news, state), states, denoiser)
        after = run(denoiser, program[name], *caches, two_tower.caches(moved), **sizes)
        return two_tower.with_mamba(after, moved)

    def begin(request: Request) -> _Half:
        state, news = run(
            context, program["prefill"], own["context"], there, context.put(request, REQUEST), capacity=capacity
        )
        dtype = two_tower.dtype_of(params)
        copy = update(state, news, "receive", capacity=capacity, dtype=dtype)
        progress = denoiser.put(nothing_written(request.count.shape[0], room), PROGRESS)
        return _Half(denoiser.put(request, REQUEST), progress, copy, state, None, [])

    def advance(half: _Half) -> None:
        """Starts one unit of a half; waits for nothing."""
        if half.news is not None:  # moved no sooner: the other half goes first on the denoiser's devices
            half.copy = update(half.state, half.news, "absorb", two_tower.caches(half.copy))
        half.progress, written = run(
            denoiser, program["write"], own["denoiser"], here, half.copy, half.progress, half.request
        )
        came = towers.move(written, WRITTEN, context)
        half.more.append([written[-1], came[-1]])
        half.state, half.news = run(context, program["read"], own["context"], half.state, *came)

    size = request.count.shape[0] // halves
    parts = [begin(_rows_of(request, slice(i * size, (i + 1) * size))) for i in range(halves)]
    for _ in range(int(request.units)):
        for half in parts:
            if not half.ended():
                advance(half)
    done = [denoiser.fetch(half.progress) for half in parts]
    return jax.tree.map(lambda *x: np.concatenate(x)[:rows] if x[0].ndim else x[0], *done)


def _rows_of(request: Request, rows: Any) -> Request:
    """Some rows of a batch."""
    return jax.tree.map(lambda x, spec: x[rows] if spec == ROWS else x, request, REQUEST)


def _padded(request: Request, multiple: int) -> Request:
    """With the last row repeated up to a multiple of rows, so that every device has as many."""
    rows = request.count.shape[0]
    return _rows_of(request, np.minimum(np.arange(-(-rows // multiple) * multiple), rows - 1))

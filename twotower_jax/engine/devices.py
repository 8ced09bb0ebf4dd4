"""A bench and slots on the devices, and the programs that run there: `Together` for towers that share their devices,
`Apart` for towers that have devices of their own.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from twotower_jax import sharding, two_tower
from twotower_jax.decoding.block import Block
from twotower_jax.engine import steps, verified
from twotower_jax.engine.rows import Bench, Kinds, News, Piece, Slots, empty_bench, empty_slots
from twotower_jax.placement import Group, Towers
from twotower_jax.programs import Program, Programs
from twotower_jax.sharding import ROWS, WHOLE

TOKENS = 16  # that rows of one token a step write in a round, at most


class Devices(Protocol):
    """What the scheduler starts, of which nothing waits for a device; and what it hears."""

    def feed(self, piece: Piece) -> None:
        """See `steps.feed`; the piece is on the host."""

    def remember(self, positions: int) -> None:
        """What the first row of each device's bench has read is the shared prefix from now on; see `steps.remember`."""

    def seat(self, cancelled: np.ndarray) -> None:
        """See `steps.seat`."""

    def write(self, mode: str, kinds: Kinds) -> list[News]:
        """Has the rows of a mode write, that may ask all this; the news, on the devices."""

    def fetch(self, news: News) -> News:
        """The news on the host."""

    def block(self) -> Block:
        """The blocks on the host, as the last round left them; this waits for the devices."""

    def rows_on(self, group: Group) -> tuple[Bench, Slots]:
        """What a group of devices holds of the rows."""


class _Place:
    """A bench and slots on a group of devices."""

    def __init__(
        self,
        group: Group,
        programs: Programs,
        what: str,
        slots: int,
        bench: int,
        block_size: int,
        prefix: int,
        **arrays,
    ):
        self.group, self._programs, self._what = group, programs, what
        states = sharding.state_spec(group.whole)
        self.bench_spec = Bench(rows=ROWS, waiting=ROWS, state=states)
        self.slots_spec = Slots(rows=ROWS, state=states, block=ROWS, begun=ROWS, history=ROWS, held=ROWS)
        shards = group.row_shards
        self.bench = self.run(Program(empty_bench, (), self.bench_spec), rows=bench // shards, **arrays)
        sizes = {"rows": slots // shards, "block_size": block_size}
        self.slots = self.run(Program(empty_slots, (), self.slots_spec), **sizes, **arrays)
        self.prefix, self.prefix_spec = None, ROWS
        if prefix:
            self._remember = Program(steps.remember, (self.bench_spec,), states)
            self.remember(prefix)
            self.prefix_spec = states
        both = (self.bench_spec, self.slots_spec)
        self._seat = Program(steps.seat, (*both, WHOLE), both, donated=(0, 1))

    def run(self, program: Program, *arrays: Any, **sizes: Any) -> Any:
        return self._programs.run(self.group, program, *arrays, what=self._what, **sizes)

    def seat(self, cancelled: np.ndarray) -> None:
        self.bench, self.slots = self.run(self._seat, self.bench, self.slots, self.group.put(cancelled, WHOLE))

    def remember(self, positions: int) -> None:
        self.prefix = self.run(self._remember, self.bench, positions=positions)

    def fetch(self, news: News) -> News:
        return self.group.fetch(news)

    def block(self) -> Block:
        return self.group.fetch(self.slots.block)


class Together:
    """Both towers, or a backbone, on the same devices."""

    def __init__(self, group: Group, programs: Programs, params: dict, share: float, mask_id: int, **sizes: Any):
        self._params = params
        self._place = here = _Place(group, programs, **sizes, dtype=two_tower.dtype_of(params))
        self._share, self._mask_id = group.put((np.float32(share), np.int32(mask_id)), WHOLE)
        own = sizes["slots"] // group.row_shards
        # Of diffusion all blocks are read that are full: rows that have none cost their experts nothing.
        self._most = {"diffusion": own, "verified": math.ceil(share * own)}
        context = sharding.specs(group.whole, "context")
        both = sharding.specs(group.whole, *params)
        bench, slots = here.bench_spec, here.slots_spec
        self._feed = Program(steps.feed, (context, bench, ROWS, here.prefix_spec), bench, donated=(1,))
        blocks = {"inputs": (both, slots, WHOLE, WHOLE), "outputs": (slots, ROWS), "donated": (1,)}
        self._blocks = {
            "diffusion": Program(steps.denoise_and_read, **blocks),
            "verified": Program(verified.draft_and_verify, **blocks),
        }
        self._write = Program(steps.write, (both, slots, WHOLE), (slots, ROWS), donated=(1,))
        self.seat, self.remember, self.fetch, self.block = here.seat, here.remember, here.fetch, here.block

    def rows_on(self, group: Group) -> tuple[Bench, Slots]:
        return self._place.bench, self._place.slots

    def feed(self, piece: Piece) -> None:
        here, context = self._place, {"context": self._params["context"]}
        here.bench = here.run(self._feed, context, here.bench, here.group.put(piece, ROWS), here.prefix)

    def write(self, mode: str, kinds: Kinds) -> list[News]:
        here = self._place
        if mode in self._blocks:
            numbers, sizes = (self._share, self._mask_id), {"kinds": kinds, "most": self._most[mode]}
            here.slots, news = here.run(self._blocks[mode], self._params, here.slots, *numbers, **sizes)
        else:
            sizes = {"mode": mode, "tokens": TOKENS, "kinds": kinds}
            here.slots, news = here.run(self._write, self._params, here.slots, self._share, **sizes)
        return [news]


class Apart:
    """Each tower on its own devices, which both have a bench and slots; the denoiser's say who has ended.

    The denoiser's copy of the context's state follows when the lane's next turn begins, and no sooner, so that the
    other lane goes first on the denoiser's devices while the context tower reads.
    """

    def __init__(self, towers: Towers, programs: Programs, params: dict, share: float, mask_id: int, **sizes: Any):
        self._towers = towers
        self._behind: list[Callable[[], None]] = []  # what the denoiser's devices have still to follow
        self._most = math.ceil(share * sizes["slots"] / towers.context.row_shards)
        self._context, self._denoiser = {"context": params["context"]}, {"denoiser": params["denoiser"]}
        sizes |= {"dtype": two_tower.dtype_of(params)}
        there, here = [_Place(group, programs, **sizes) for group in towers.groups]
        self._there, self._here = there, here
        self._share, self._mask_id = here.group.put((np.float32(share), np.int32(mask_id)), WHOLE)
        self._share_there = there.group.put(np.float32(share), WHOLE)
        context, denoiser = (sharding.specs(here.group.whole, name) for name in ("context", "denoiser"))
        self._states = states = sharding.state_spec(here.group.whole)
        bench, slots = here.bench_spec, here.slots_spec
        prefix = here.prefix_spec
        self._feed = Program(steps.feed_apart, (context, bench, ROWS, prefix), (bench, states), donated=(1,))
        self._follow = Program(steps.follow, (bench, ROWS, states, prefix), bench, donated=(0,))
        self._denoise = Program(steps.denoise, (denoiser, slots, WHOLE, WHOLE), (slots, ROWS, ROWS), donated=(1,))
        self._mock = Program(steps.write_apart, (denoiser, slots), (slots, ROWS, ROWS, ROWS), donated=(1,))
        self._read = Program(steps.read_apart, (context, slots, ROWS, ROWS, ROWS), (slots, ROWS, states), donated=(1,))
        self._absorb = Program(steps.absorb, (slots, ROWS, states), slots, donated=(0,))
        self._write = Program(steps.write, (context, slots, WHOLE), (slots, ROWS), donated=(1,))
        self._draft = Program(verified.draft, (denoiser, slots, WHOLE, WHOLE), (slots, ROWS, ROWS), donated=(1,))
        self._verify = Program(
            verified.verify_apart, (context, slots, ROWS), (slots, ROWS, ROWS, ROWS, states), donated=(1,)
        )
        self._heed = Program(verified.heed, (slots, ROWS, ROWS, states), slots, donated=(0,))
        self._release = Program(steps.release, (slots, ROWS), slots, donated=(0,))

    def fetch(self, news: News) -> News:
        return self._here.fetch(news)

    def block(self) -> Block:
        return self._here.block()

    def rows_on(self, group: Group) -> tuple[Bench, Slots]:
        place = self._here if group is self._here.group else self._there
        return place.bench, place.slots

    def feed(self, piece: Piece) -> None:
        there, here = self._there, self._here
        fed = there.group.put(piece, ROWS)
        there.bench, news = there.run(self._feed, self._context, there.bench, fed, there.prefix)
        came = self._towers.move(news, self._states, here.group)

        def follow() -> None:
            here.bench = here.run(self._follow, here.bench, here.group.put(piece, ROWS), came, here.prefix)

        self._behind.append(follow)

    def remember(self, positions: int) -> None:
        self._catch_up()
        self._there.remember(positions)
        self._here.remember(positions)

    def seat(self, cancelled: np.ndarray) -> None:
        self._catch_up()
        self._there.seat(cancelled)
        self._here.seat(cancelled)

    def write(self, mode: str, kinds: Kinds) -> list[News]:
        there, here = self._there, self._here
        if mode == "ar":
            sizes = {"mode": mode, "tokens": TOKENS, "kinds": kinds}
            there.slots, news = there.run(self._write, self._context, there.slots, self._share_there, **sizes)
            ticket = self._towers.move(there.slots.rows.ticket, ROWS, here.group)

            def let_go() -> None:
                here.slots = here.run(self._release, here.slots, ticket)

            self._behind.append(let_go)
            return [news]
        self._catch_up()
        if mode == "diffusion":
            numbers, sizes = (self._share, self._mask_id), {"kinds": kinds, "most": self._most}
            here.slots, news, reads = here.run(self._denoise, self._denoiser, here.slots, *numbers, **sizes)
            self._send(here.slots.block.tokens, reads, self._most)
            return [news]
        if mode == "verified":
            return [self._write_verified(kinds)]
        heard = []
        for _ in range(TOKENS):
            self._catch_up()
            here.slots, news, last, reads = here.run(self._mock, self._denoiser, here.slots, kinds=kinds)
            self._send(last, reads, last.shape[0] // here.group.row_shards)
            heard.append(news)
        return heard

    def _write_verified(self, kinds: Kinds) -> News:
        there, here = self._there, self._here
        numbers, sizes = (self._share, self._mask_id), {"kinds": kinds, "most": self._most}
        here.slots, *drafts = here.run(self._draft, self._denoiser, here.slots, *numbers, **sizes)
        told = (here.slots.block.tokens, *drafts, here.slots.rows.ticket)
        came = self._towers.move(told, ROWS, there.group)
        there.slots, news, *found = there.run(self._verify, self._context, there.slots, came, **sizes)
        found = self._towers.move(tuple(found), (ROWS, ROWS, self._states), here.group)

        def heed() -> None:
            here.slots = here.run(self._heed, here.slots, *found)

        self._behind.append(heed)
        return news

    def _send(self, tokens: jax.Array, reads: jax.Array, most: int) -> None:
        """Has the context tower read of so many rows at most."""
        there, here = self._there, self._here
        came = self._towers.move((tokens, reads, here.slots.rows.ticket), ROWS, there.group)
        there.slots, *news = there.run(self._read, self._context, there.slots, *came, most=most)
        rows, states = self._towers.move(tuple(news), (ROWS, self._states), here.group)

        def absorb() -> None:
            here.slots = here.run(self._absorb, here.slots, rows, states)

        self._behind.append(absorb)

    def _catch_up(self) -> None:
        while self._behind:
            self._behind.pop(0)()

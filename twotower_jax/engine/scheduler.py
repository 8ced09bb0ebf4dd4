"""Which programs the host starts, and when: prompts are read, slots filled and written; what was written is heard."""

import collections
import dataclasses
import operator
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from twotower_jax import inputs
from twotower_jax.decoding import BLOCK_MODES, MODES
from twotower_jax.decoding.block import Block
from twotower_jax.engine.devices import Apart, Devices, Together
from twotower_jax.engine.request import Event, Request, cut
from twotower_jax.engine.rows import EMPTY, Kinds, News, Piece, as_rows, no_piece
from twotower_jax.engine.sizes import lanes_of, piece_of
from twotower_jax.errors import InputError
from twotower_jax.placement import Towers
from twotower_jax.programs import Programs

SHARE = 0.25  # of the rows that have a full block are enough for the context tower to read them
CANCELLED = 8  # rows that one program ends at most


@dataclasses.dataclass
class Row:
    """A request at work, as the host knows it.

    Attributes:
      request: what is asked.
      lane: where it is.
      known: tokens of its prompt that are the engine's prefix: all of it, or none.
      read: tokens of its prompt that the bench was fed, or knew.
      tokens: how many it has written.
      denoised, committed: passes of the denoiser, and of the context tower over blocks.
      rounds: in which it wrote.
    """

    request: Request
    lane: "_Lane"
    known: int = 0
    read: int = -1
    tokens: int = 0
    denoised: int = 0
    committed: int = 0
    rounds: int = 0

    @property
    def forwards(self) -> tuple[int, int]:
        """Of denoiser and context tower, which reads the prompt in one and, with it, AR's first token."""
        return {
            "diffusion": (self.denoised, 1 + self.committed),
            "ar": (0, self.denoised),
            "mock-ar": (self.denoised, 1 + self.denoised),
            "verified": (self.denoised, self.rounds),
        }[self.request.mode]


@dataclasses.dataclass
class Use:
    """How full the slots were.

    Attributes:
      rounds: heard of so far.
      places: slots of all rounds that began while requests were waiting.
      occupied: those of them that had a row.
    """

    rounds: int = 0
    places: int = 0
    occupied: int = 0

    @property
    def share(self) -> float | None:
        """Of the slots that had a row, until no request was waiting; None if none ever was."""
        return self.occupied / self.places if self.places else None


@dataclasses.dataclass(eq=False)
class _Lane:
    """A bench and slots, and what the host knows of them.

    Attributes:
      devices: where they are.
      places: tickets of the rows on the bench, as far as is known.
      cancelled: tickets of rows that are to end.
      rounds: what was started and is not heard of yet: the news, blocks that are watched, and whether requests were
        waiting then.
    """

    devices: Devices
    places: list[int]
    cancelled: list[int] = dataclasses.field(default_factory=list)
    rounds: collections.deque[tuple[list[tuple[News, Block | None]], bool]] = dataclasses.field(
        default_factory=collections.deque
    )


class Engine:
    """Runs requests on the towers' devices.

    Where each tower has its own, there are two lanes, of half of the slots each: the context tower reads what one wrote
    while the denoiser has the other.

    Attributes:
      slots: rows that are written at a time.
      bench: rows that wait, beside them.
      capacity: positions that a row can have.
      block_size: the largest.
      use: of the slots.
      about: its size, in one line.

    Args:
      share: see `steps.denoise`.
      watches: whether events bring their blocks, for which the host waits each round.
      prefix: tokens that prompts begin with, most of them at least, which are read once.
      kinds: what requests will ask, if it is known, so that no program is compiled for less.
    """

    def __init__(
        self,
        towers: Towers,
        programs: Programs,
        params: dict,
        *,
        slots: int,
        capacity: int,
        block_size: int,
        mask_id: int = 3,
        share: float = SHARE,
        about: str = "",
        watches: bool = False,
        prefix: Sequence[int] = (),
        kinds: Kinds | None = None,
    ):
        self._shards = towers.context.row_shards
        lanes, self._lane_slots, self._lane_bench = lanes_of(towers, slots, capacity)
        self.slots, self.bench = lanes * self._lane_slots, lanes * self._lane_bench
        self.capacity, self.block_size = capacity, block_size
        self.use, self.about, self._watches = Use(), about, watches
        sizes = {"slots": self._lane_slots, "bench": self._lane_bench, "capacity": capacity, "block_size": block_size}
        self._prefix = np.asarray(prefix, np.int32)
        remembered = min(inputs.bucket(len(prefix)), capacity) if len(prefix) else 0
        sizes |= {"share": share, "mask_id": mask_id, "prefix": remembered}
        sizes |= {"what": f"{self.slots} rows of {capacity} positions, and {self.bench} that wait"}
        made = Apart if towers.split else Together
        where = towers if towers.split else towers.context
        self._lanes = [_Lane(made(where, programs, params, **sizes), [EMPTY] * self._lane_bench) for _ in range(lanes)]
        for lane in self._lanes if remembered else ():
            self._learn(lane.devices, remembered)
        self._rows: dict[int, Row] = {}  # by ticket
        self._kinds = kinds or Kinds()
        self._tickets: dict[Hashable, int] = {}
        self._next = 0

    def _learn(self, devices: Devices, positions: int) -> None:
        """Reads the prefix, on the first place of every device's bench."""
        n, every = self._lane_bench, self._lane_bench // self._shards
        width, no = piece_of(n, len(self._prefix)), np.zeros(n, bool)
        for start in range(0, len(self._prefix), width):
            part = self._prefix[start : start + width]
            tokens, count, fresh = np.zeros((n, width), np.int32), np.zeros(n, np.int32), no.copy()
            tokens[::every, : len(part)], count[::every], fresh[::every] = part, len(part), start == 0
            devices.feed(Piece(as_rows([None] * n, [EMPTY] * n), fresh, no, tokens, count, no))
        devices.remember(positions)

    def rehearse(self, requests: Sequence[Request]) -> None:
        """Starts every program that checked requests will need, with no rows; see `shapes.Ahead`."""
        requests = [request for request in requests if request.max_new_tokens]
        if not requests:
            return
        widths = {piece_of(self._lane_bench, request.read_first - self._known(request)) for request in requests}
        asked = {request.mode for request in requests}
        modes = [mode for mode in MODES if mode in asked]
        rehearse(self._lanes[0].devices, self._lane_bench, sorted(widths), modes, self._kinds)

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Takes checked requests as there is room for them, and gives events as rows write.

        Raises:
          InputError: a request does not fit; what was running is lost to this call.
        """
        queue = _Peekable(requests)
        while self._rows or not queue.ended:
            for lane in self._lanes:
                yield from self._welcome(lane, queue)
                modes = self._modes(lane)
                if modes:
                    self._seat(lane)
                    news = [part for mode in modes for part in self._write(lane, mode)]
                    for leaf in jax.tree.leaves([part for part, _ in news]):
                        if leaf.is_fully_addressable:
                            leaf.copy_to_host_async()
                    lane.rounds.append((news, not queue.ended))
                self._feed(lane)
                if lane.rounds and (len(lane.rounds) > 1 or not modes):
                    yield from self._hear(lane)
        for lane in self._lanes:
            lane.rounds.clear()

    def cancel(self, key: Hashable) -> Event | None:
        """Ends a row; what it writes in the meantime is not heard. None if there is no such row any more."""
        ticket = self._tickets.get(key)
        if ticket is None:
            return None
        lane = self._rows[ticket].lane
        lane.cancelled.append(ticket)
        lane.places = [EMPTY if t == ticket else t for t in lane.places]
        return self._end(ticket, [], [], "cancelled", None)

    def refuses(self, request: Request) -> str | None:
        """Why a checked request does not fit, or None."""
        if request.block > self.block_size:
            return f"block_size {request.block_size} is more than the {self.block_size} that the engine was made for"
        if request.positions > self.capacity:
            return (
                f"{len(request.prompt)} prompt tokens and {request.max_new_tokens} new ones do not fit "
                f"the {self.capacity} positions that the engine was made for"
            )
        return None

    def _welcome(self, lane: _Lane, queue: "_Peekable") -> Iterator[Event]:
        """New requests on free places of the bench."""
        for place, ticket in enumerate(lane.places):
            while ticket == EMPTY and not queue.ended:
                request = queue.take()
                if request.key in self._tickets:
                    raise InputError(f"two requests at work have the key {request.key!r}")
                if why := self.refuses(request):
                    raise InputError(f"request {request.key!r}: {why}")
                if request.max_new_tokens == 0:
                    yield Event(request.key, [], [], "length", None, 0, 0)
                    continue
                ticket, self._next = self._next, (self._next + 1) % (2**31 - 1)
                self._rows[ticket] = Row(request, lane, self._known(request))
                self._kinds = self._kinds.including(request)
                self._tickets[request.key] = ticket
                lane.places[place] = ticket

    def _known(self, request: Request) -> int:
        """Tokens of its prompt that are the engine's prefix."""
        n = len(self._prefix)
        return n if n <= request.read_first and np.array_equal(request.prompt[:n], self._prefix) else 0

    def _feed(self, lane: _Lane) -> None:
        """Reads a piece of the prompts on the bench, unless enough rows wait that one can wait for more prompts."""
        reading = {i: t for i, t in enumerate(lane.places) if t != EMPTY and not self._ready(t)}
        waiting = sum(t != EMPTY for t in lane.places) - len(reading)
        if not reading or (waiting and 2 * len(reading) < self._lane_bench):
            return
        width = piece_of(self._lane_bench, max(self._left(t) for t in reading.values()))
        tokens = np.zeros((self._lane_bench, width), np.int32)
        count = np.zeros(self._lane_bench, np.int32)
        fresh, known, ready = (np.zeros(self._lane_bench, bool) for _ in range(3))
        for place, ticket in reading.items():
            row = self._rows[ticket]
            if row.read < 0:
                row.read, fresh[place], known[place] = row.known, True, row.known > 0
            piece = row.request.prompt[row.read : min(row.read + width, row.request.read_first)]
            tokens[place, : len(piece)], count[place] = piece, len(piece)
            row.read += len(piece)
            ready[place] = row.read == row.request.read_first
        requests = [self._rows[t].request if t in self._rows else None for t in lane.places]
        lane.devices.feed(Piece(as_rows(requests, lane.places), fresh, known, tokens, count, ready))

    def _ready(self, ticket: int) -> bool:
        return self._left(ticket) == 0 and self._rows[ticket].read >= 0

    def _left(self, ticket: int) -> int:
        """Tokens of the prompt that are not read."""
        row = self._rows[ticket]
        return row.request.read_first - (row.known if row.read < 0 else row.read)

    def _modes(self, lane: _Lane) -> list[str]:
        """Those of rows that wait for a slot or have one."""
        found = {row.request.mode for ticket, row in self._rows.items() if row.lane is lane and self._ready(ticket)}
        return [mode for mode in MODES if mode in found]

    def _seat(self, lane: _Lane) -> None:
        while True:
            now, lane.cancelled = lane.cancelled[:CANCELLED], lane.cancelled[CANCELLED:]
            if now or any(t != EMPTY and self._ready(t) for t in lane.places):
                cancelled = np.full(CANCELLED, EMPTY - 1, np.int32)
                cancelled[: len(now)] = now
                lane.devices.seat(cancelled)
            if not lane.cancelled:
                return

    def _write(self, lane: _Lane, mode: str) -> list[tuple[News, Block | None]]:
        """The news of a round, each with the blocks that it is of, if they are watched."""
        news = lane.devices.write(mode, self._kinds)
        block = lane.devices.block() if self._watches and mode in BLOCK_MODES else None
        return [(part, block) for part in news]

    def _hear(self, lane: _Lane) -> Iterator[Event]:
        """What the lane's oldest round wrote."""
        seated: set[int] = set()
        parts, loaded = lane.rounds.popleft()
        for there, block in parts:
            news = lane.devices.fetch(there)
            seated |= set(news.ticket.tolist())
            for i in np.flatnonzero((news.count > 0) | news.ended):
                if (ticket := int(news.ticket[i])) in self._rows:
                    event = self._wrote(ticket, news, i)
                    yield dataclasses.replace(event, block=jax.tree.map(operator.itemgetter(i), block))
        seated.discard(EMPTY)
        lane.places = [EMPTY if t in seated else t for t in lane.places]
        self.use.rounds += 1
        if loaded:
            self.use.places += self._lane_slots
            self.use.occupied += len(seated)

    def _wrote(self, ticket: int, news: News, i: int) -> Event:
        row = self._rows[ticket]
        n = min(int(news.count[i]), row.request.max_new_tokens - row.tokens)
        n = cut(news.tokens[i, :n], row.request.eos_token_id)
        tokens = news.tokens[i, :n].tolist()
        with np.errstate(divide="ignore"):
            logprobs = np.log(news.probability[i, :n]).tolist()
        row.tokens += n
        row.denoised += int(news.forwards[i])
        row.committed += not news.ended[i]
        row.rounds += 1
        if not news.ended[i]:
            return Event(row.request.key, tokens, logprobs, None, None, *row.forwards)
        if news.failed[i]:
            return self._end(ticket, tokens, logprobs, "error", "a logit was not finite; the row ends before it")
        stopped = n > 0 and tokens[-1] in row.request.eos_token_id
        return self._end(ticket, tokens, logprobs, "stop" if stopped else "length", None)

    def _end(self, ticket: int, tokens: list[int], logprobs: list[float], end: str, error: str | None) -> Event:
        row = self._rows.pop(ticket)
        del self._tickets[row.request.key]
        return Event(row.request.key, tokens, logprobs, end, error, *row.forwards)


def rehearse(devices: Devices, bench: int, widths: Sequence[int], modes: Sequence[str], kinds: Kinds) -> None:
    """Starts every program once, with no rows, those first that take longest to compile.

    Args:
      devices: where.
      bench: its rows.
      widths: of pieces of prompts.
      modes, kinds: of the rows that are to come.
    """
    nobody = np.full(CANCELLED, EMPTY, np.int32)
    for mode in modes:
        devices.write(mode, kinds)
    for width in widths:
        devices.feed(no_piece(bench, width))
    devices.seat(nobody)  # by which a denoiser's own devices follow, too


class _Peekable:
    """An iterator that knows whether it has ended."""

    def __init__(self, items: Iterable):
        self._items = iter(items)
        self.ended = False
        self._advance()

    def _advance(self) -> None:
        try:
            self._item = next(self._items)
        except StopIteration:
            self.ended = True

    def take(self) -> Any:
        item = self._item
        self._advance()
        return item

"""Which programs the host starts, and when: prompts are read, slots filled and written; what was written is heard."""

import collections
import dataclasses
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from twotower_jax import sharding, two_tower
from twotower_jax.engine import steps
from twotower_jax.engine.request import MODES, Event, Request, cut
from twotower_jax.engine.rows import EMPTY, Bench, News, Slots, as_rows, empty_bench, empty_slots
from twotower_jax.errors import InputError
from twotower_jax.placement import Group
from twotower_jax.programs import Program, Programs
from twotower_jax.sharding import ROWS, WHOLE

SHARE = 0.25  # of the rows that have a full block are read together
TOKENS = 16  # that rows of one token a step write in a round, at most
CANCELLED = 8  # rows that one program ends at most


@dataclasses.dataclass
class Row:
    """A request at work, as the host knows it.

    Attributes:
      request: what is asked.
      read: tokens of its prompt that the bench was fed.
      tokens: how many it has written.
      denoised, committed: passes of the denoiser, and of the context tower over blocks.
    """

    request: Request
    read: int = -1
    tokens: int = 0
    denoised: int = 0
    committed: int = 0

    @property
    def forwards(self) -> tuple[int, int]:
        """Of denoiser and context tower, which reads the prompt in one and, with it, AR's first token."""
        return {
            "diffusion": (self.denoised, 1 + self.committed),
            "ar": (0, self.denoised),
            "mock-ar": (self.denoised, 1 + self.denoised),
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
    def share(self) -> float:
        """Of the slots that had a row, until no request was waiting."""
        return self.occupied / self.places if self.places else 0.0


@dataclasses.dataclass
class _Round:
    """What was started and is not heard of yet: the news of each mode's rows, on the devices."""

    news: list[News]
    loaded: bool


class Engine:
    """Runs requests on the devices that both towers share.

    Attributes:
      slots, bench: rows of each.
      capacity: positions that a row can have.
      block_size: the largest.
      use: of the slots.
      about: its size, in one line.
    """

    def __init__(
        self,
        group: Group,
        programs: Programs,
        params: dict,
        *,
        slots: int,
        capacity: int,
        block_size: int,
        mask_id: int = 3,
        share: float = SHARE,
        about: str = "",
    ):
        shards = group.row_shards
        self.slots = -(-slots // shards) * shards
        self.bench = -(-self.slots // shards // 2) * shards
        self.capacity, self.block_size = capacity, block_size
        self.use, self.about = Use(), about
        self._group, self._programs, self._params = group, programs, params
        self._what = f"{self.slots} rows of {capacity} positions, and {self.bench} that wait"
        config = group.whole
        states = sharding.state_spec(config)
        bench_spec = Bench(rows=ROWS, waiting=ROWS, state=states)
        slots_spec = Slots(rows=ROWS, state=states, block=ROWS, begun=ROWS)
        self._program = _described(config, "denoiser" in params, bench_spec, slots_spec)
        dtype = two_tower.dtype_of(params)
        arrays = {"capacity": capacity, "dtype": dtype}
        self._on_bench = self._run("empty_bench", rows=self.bench // shards, **arrays)
        self._in_slots = self._run("empty_slots", rows=self.slots // shards, block_size=block_size, **arrays)
        self._mask_id, self._share = group.put((np.int32(mask_id), np.float32(share)), WHOLE)
        self._rows: dict[int, Row] = {}  # by ticket
        self._tickets: dict[Hashable, int] = {}
        self._places: list[int] = [EMPTY] * self.bench  # tickets of the rows on the bench, as far as is known
        self._cancelled: list[int] = []
        self._next = 0

    def _run(self, name: str, *arrays: Any, **sizes: Any) -> Any:
        return self._programs.run(self._group, self._program[name], *arrays, what=self._what, **sizes)

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Takes checked requests as there is room for them, and gives events as rows write.

        Raises:
          InputError: a request does not fit; what was running is lost to this call.
        """
        queue = _Peekable(requests)
        rounds: collections.deque[_Round] = collections.deque()
        while True:
            yield from self._welcome(queue)
            self._feed()
            modes = self._modes()
            if modes:
                self._seat()
                rounds.append(_Round([self._write(mode) for mode in modes], not queue.ended))
            if rounds and (len(rounds) > 1 or not modes):
                yield from self._hear(rounds.popleft())
            if not self._rows and queue.ended:
                return

    def cancel(self, key: Hashable) -> Event | None:
        """Ends a row; what it writes in the meantime is not heard. None if there is no such row any more."""
        ticket = self._tickets.get(key)
        if ticket is None:
            return None
        self._cancelled.append(ticket)
        if ticket in self._places:
            self._places[self._places.index(ticket)] = EMPTY
        return self._end(ticket, [], [], "cancelled", None)

    def refuses(self, request: Request) -> str | None:
        """Why a checked request does not fit, or None."""
        if request.mode == "diffusion" and request.block_size > self.block_size:
            return f"block_size {request.block_size} is more than the {self.block_size} that the engine was made for"
        if request.positions > self.capacity:
            return (
                f"{len(request.prompt)} prompt tokens and {request.max_new_tokens} new ones do not fit "
                f"the {self.capacity} positions that the engine was made for"
            )
        return None

    def _welcome(self, queue: "_Peekable") -> Iterator[Event]:
        """New requests on free places of the bench."""
        for place, ticket in enumerate(self._places):
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
                self._rows[ticket] = Row(request)
                self._tickets[request.key] = ticket
                self._places[place] = ticket

    def _feed(self) -> None:
        """Reads a piece of the prompts on the bench, unless enough rows wait that one can wait for more prompts."""
        reading = {i: t for i, t in enumerate(self._places) if t != EMPTY and not self._ready(t)}
        waiting = sum(t != EMPTY for t in self._places) - len(reading)
        if not reading or (waiting and 2 * len(reading) < self.bench):
            return
        width = self._width(max(self._left(t) for t in reading.values()))
        tokens = np.zeros((self.bench, width), np.int32)
        count = np.zeros(self.bench, np.int32)
        fresh, ready = np.zeros(self.bench, bool), np.zeros(self.bench, bool)
        for place, ticket in reading.items():
            row = self._rows[ticket]
            fresh[place], row.read = row.read < 0, max(row.read, 0)
            piece = row.request.prompt[row.read : min(row.read + width, row.request.read_first)]
            tokens[place, : len(piece)], count[place] = piece, len(piece)
            row.read += len(piece)
            ready[place] = row.read == row.request.read_first
        requests = [self._rows[t].request if t in self._rows else None for t in self._places]
        new = as_rows(requests, self._places)
        arrays = self._group.put((new, fresh, tokens, count, ready), ROWS)
        self._on_bench = self._run("feed", {"context": self._params["context"]}, self._on_bench, *arrays)

    def _ready(self, ticket: int) -> bool:
        return self._left(ticket) == 0 and self._rows[ticket].read >= 0

    def _left(self, ticket: int) -> int:
        """Tokens of the prompt that are not read."""
        row = self._rows[ticket]
        return row.request.read_first - max(row.read, 0)

    def _width(self, longest: int) -> int:
        """Of a piece: one of few, so that few programs are compiled."""
        most = max(16, two_tower.PREFILL_TOKENS // self.bench)
        width = 16
        while width < min(longest, most):
            width *= 4
        return min(width, 1 << (most.bit_length() - 1))

    def _modes(self) -> list[str]:
        """Those of rows that wait for a slot or have one."""
        found = {row.request.mode for ticket, row in self._rows.items() if self._ready(ticket)}
        return [mode for mode in MODES if mode in found]

    def _seat(self) -> None:
        while True:
            now, self._cancelled = self._cancelled[:CANCELLED], self._cancelled[CANCELLED:]
            cancelled = np.full(CANCELLED, EMPTY - 1, np.int32)
            cancelled[: len(now)] = now
            if now or any(t != EMPTY and self._ready(t) for t in self._places):
                cancelled = self._group.put(cancelled, WHOLE)
                self._on_bench, self._in_slots = self._run("seat", self._on_bench, self._in_slots, cancelled)
            if not self._cancelled:
                return

    def _write(self, mode: str) -> News:
        if mode == "diffusion":
            self._in_slots, news = self._run("denoise", self._params, self._in_slots, self._share, self._mask_id)
        else:
            sizes = {"mode": mode, "tokens": TOKENS}
            self._in_slots, news = self._run("write", self._params, self._in_slots, self._share, **sizes)
        for leaf in dataclasses.astuple(news):
            leaf.copy_to_host_async()
        return news

    def _hear(self, round_: _Round) -> Iterator[Event]:
        seated: set[int] = set()
        for news in map(self._group.fetch, round_.news):
            seated |= set(news.ticket.tolist())
            for i in np.flatnonzero((news.count > 0) | news.ended):
                if (ticket := int(news.ticket[i])) in self._rows:
                    yield self._wrote(ticket, news, i)
        seated.discard(EMPTY)
        self._places = [EMPTY if t in seated else t for t in self._places]
        self.use.rounds += 1
        if round_.loaded:
            self.use.places += self.slots
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


def _described(config: Any, two_towers: bool, bench: Any, slots: Any) -> dict[str, Program]:
    """The engine's programs."""
    context = sharding.specs(config, "context")
    params = sharding.specs(config, "context", "denoiser") if two_towers else context
    rows: PartitionSpec = ROWS
    return {
        "empty_bench": Program(empty_bench, (), bench),
        "empty_slots": Program(empty_slots, (), slots),
        "feed": Program(steps.feed, (context, bench, rows, rows, rows, rows, rows), bench, donated=(1,)),
        "seat": Program(steps.seat, (bench, slots, WHOLE), (bench, slots), donated=(0, 1)),
        "denoise": Program(steps.denoise, (params, slots, WHOLE, WHOLE), (slots, rows), donated=(1,)),
        "write": Program(steps.write, (params, slots, WHOLE), (slots, rows), donated=(1,)),
    }

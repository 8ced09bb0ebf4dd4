"""A file of requests into a file of results, which a job that was stopped in any way goes on with."""

import collections
import dataclasses
import functools
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from twotower_jax import distributed, two_tower
from twotower_jax.engine import sizes
from twotower_jax.engine.answers import Answer, grow
from twotower_jax.engine.files import Lines, Results, opened
from twotower_jax.engine.lines import Line, Reader, refusal, result
from twotower_jax.engine.request import Request, common, counted, worth_sharing
from twotower_jax.engine.rows import Kinds
from twotower_jax.interrupts import Stop
from twotower_jax.model import Model

POSITIONS = 2**18  # of a request at most: what the released model was trained for
GRACE = 20.0  # seconds that rows have to end when the job is asked to stop
STOPPED = "twotower: stopped before the end; the same command goes on"
LONG = 4096  # positions, up to which rows of all lengths share slots


@dataclasses.dataclass(frozen=True)
class Options:
    """How a job is run.

    Attributes:
      defaults: fields of `Request` for lines that do not say.
      eos: ids that end a row; the model's by default.
      slots: rows that are written at a time; by default as many as fit and pay.
      memory: bytes of each device for them; most of what is free by default.
      positions: of prompt and new tokens together, at most.
      shard: (i, n): of every n lines the one at place i.
    """

    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    eos: list[int] | None = None
    slots: int | None = None
    memory: int | None = None
    positions: int = POSITIONS
    shard: tuple[int, int] = (0, 1)


@dataclasses.dataclass
class Summary:
    """What a job did, in this run of it.

    Attributes:
      lines: of the input, or of its shard.
      done_before: that earlier runs answered.
      results, errors: lines that this run wrote.
      prompt_tokens, tokens: of the results.
      denoiser_forwards, context_forwards: passes that the rows needed, added over rows.
      seconds: of generation, without compilation.
      compile_seconds: of compilation.
      tokens_per_second: tokens by seconds.
      forwards: the passes that tokens per forward is counted by, see `engine.request.counted`.
      tokens_per_forward: None if there were none.
      latency: seconds from when a line is taken to when it is answered, without compilation: quantiles by name.
      slots: rows at a time.
      slot_use: share of slots that had a row while requests waited; None if none ever did.
      interrupted: whether it was asked to stop.
    """

    lines: int = 0
    done_before: int = 0
    results: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    denoiser_forwards: int = 0
    context_forwards: int = 0
    forwards: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    tokens_per_second: float = 0.0
    tokens_per_forward: float | None = None
    latency: dict[str, float] = dataclasses.field(default_factory=dict)
    slots: int = 0
    slot_use: float | None = None
    interrupted: bool = False

    def finish(self, latencies: list[float]) -> None:
        """Makes the quotients and quantiles."""
        self.tokens_per_second = self.tokens / self.seconds if self.tokens else 0.0
        self.tokens_per_forward = self.tokens / self.forwards if self.forwards else None
        if latencies:
            values = np.quantile(latencies, [0.5, 0.9, 0.99]).tolist()
            self.latency = dict(zip(("p50", "p90", "p99"), values, strict=True))

    def __str__(self) -> str:
        rate = "" if self.tokens_per_forward is None else f", {self.tokens_per_forward:.2f} tokens per forward"
        waits = "".join(f", {name} {seconds:.2f} s" for name, seconds in self.latency.items())
        latency = f"; latency{waits[1:]}" if waits else ""
        use = "" if self.slot_use is None else f", {self.slot_use:.0%} of them in use"
        slots = f"; {self.slots} slots{use}" if self.slots else ""
        before = f", {self.done_before} were done before" if self.done_before else ""
        return (
            f"{self.results} results and {self.errors} errors of {self.lines} lines{before}\n"
            f"{self.tokens} tokens in {self.seconds:.1f} s, and {self.compile_seconds:.1f} s to compile: "
            f"{self.tokens_per_second:.0f} tokens/s{rate}\n"
            f"{self.denoiser_forwards} denoiser and {self.context_forwards} context forwards{slots}{latency}"
        )


def run(
    model: Model, tokenizer: Tokenizer | None, source: str, target: str, options: Options, name: str = "model"
) -> Summary:
    """Answers every line of a file, once.

    Results are written as they come, in any order; lines that `target` answers already are left out, so that the same
    call goes on where another was stopped. A line that is wrong is answered by its error.

    Args:
      model: what writes.
      tokenizer: its own, if it has one.
      source: a file of lines, which may be compressed (.gz, .bz2, .xz), or `-` for standard input.
      target: a file, or `-` for standard output, which cannot be gone on with.
      options: how.
      name: of the model, for results of lines that name none.

    Raises:
      InputError: a file cannot be read or written, or holds something else; what is written stays, and counts.
    """
    alone = not distributed.joined()  # processes that heard a signal at different times would go apart
    with opened(source) as lines, Results(target) as results, Stop(GRACE, STOPPED, listens=alone) as stop:
        return Job(model, tokenizer, lines, results, options, name, stop).run()


def of_shard(lines: Iterator[tuple[int, bytes, int]], shard: tuple[int, int]) -> Iterator[tuple[int, bytes, int]]:
    """Of every n lines the one at place i."""
    i, n = shard
    return (line for line in lines if (line[0] - 1) % n == i)


def survey(
    lines: Iterator[tuple[int, bytes, int]], reader: Reader, results: Results, summary: Summary, stop: Stop
) -> Iterator[tuple[Line, bytes, int]]:
    """The lines that are still to be answered, with their bytes and checksums; those that are wrong are answered."""
    first: dict[str, int] = {}
    for number, raw, checksum in lines:
        if stop.asked:
            return
        summary.lines += 1
        line = reader.line(number, raw, checksum)
        if line.custom_id is not None and first.setdefault(line.custom_id, number) != number:
            why = f"custom_id {line.custom_id!r} is line {first[line.custom_id]}'s already"
            line = dataclasses.replace(line, ask=None, error=why)
        if results.has(number, reader.checksum(checksum)):
            summary.done_before += 1
        elif line.ask is None:
            summary.errors += 1
            results.write(refusal(line))
        else:
            yield line, raw, checksum


class Job:
    """See `run`; the lines come from anywhere, and the results go there."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer | None,
        lines: Lines,
        results: Results,
        options: Options,
        name: str,
        stop: Stop,
    ):
        self._model, self._tokenizer, self._lines, self._results = model, tokenizer, lines, results
        self._options, self._name, self._stop = options, name, stop
        self._eos = model.config.eos_token_ids if options.eos is None else options.eos
        self._dtype = two_tower.dtype_of(model.params)
        sizes.plan(
            model.towers, self._dtype, longest=1, block_size=16, room=options.memory
        )  # says so if not one row fits

        @functools.cache
        def possible(block_size: int) -> int:
            block = sizes.block_of(block_size)
            return min(options.positions, sizes.longest(model.towers, self._dtype, block, options.memory))

        self._reader = Reader(
            tokenizer,
            model.config.vocab_size,
            model.two_towers,
            self._eos,
            options.defaults,
            possible,
            f"{model.identity} {self._dtype.name}",
        )
        self.summary = Summary()
        self._latencies: list[float] = []

    def _clock(self) -> float:
        """Seconds, of which compilation takes none."""
        return time.perf_counter() - self._model.programs.compile_seconds

    def run(self) -> Summary:
        s, compiled = self.summary, self._model.programs.compile_seconds
        with distributed.checked_together() as said:
            classes = self._survey()
            said += [s.lines, s.done_before, s.errors, classes.found()]
        with tqdm(total=s.lines, initial=s.done_before + s.errors, unit="requests", disable=_hidden()) as bar:
            start = self._clock()
            for class_ in classes.found():
                self._run_class(classes, class_, bar)
            s.compile_seconds = self._model.programs.compile_seconds - compiled
            s.seconds = self._clock() - start
        s.finish(self._latencies)
        s.interrupted = self._stop.asked
        return s

    def _survey(self) -> "_Classes":
        """Looks at every line: answers those that are wrong, and finds what the others need."""
        classes = _Classes(self._model, self._dtype, self._options)
        mine = of_shard(self._lines(), self._options.shard)
        for line, _, _ in survey(mine, self._reader, self._results, self.summary, self._stop):
            classes.add(line.number, line.ask.request)
        return classes

    def _run_class(self, classes: "_Classes", class_: "_Class", bar: tqdm) -> None:
        """Answers the lines of one class."""
        if self._stop.asked:
            return
        model, s = self._model, self.summary
        engine = model.engine(
            longest=class_.longest,
            block_size=class_.block,
            waiting=class_.count,
            slots=self._options.slots,
            memory=self._options.memory,
            prefix=worth_sharing(classes.prefix(class_), class_.count),
            kinds=classes.kinds,
        )
        if distributed.first():
            print(engine.about, file=sys.stderr)
        at_work: dict[int, tuple[Line, float]] = {}  # and when it began

        def answers() -> Iterator[Answer]:
            for number, raw, checksum in of_shard(self._lines(), self._options.shard):
                if self._stop.asked:
                    return
                if classes.of(number) == class_:
                    line = self._reader.line(number, raw, checksum)
                    at_work[number] = line, self._clock()
                    yield Answer(line.ask.request, line.ask.stop)

        for answer in grow(engine, self._tokenizer, answers()):
            if answer.end is not None:
                line, began = at_work.pop(answer.request.key)
                self._latencies.append(self._clock() - began)
                self._write(line, answer)
                bar.update()
                spent = bar.format_dict["elapsed"] or 1
                rate = s.tokens / s.forwards if s.forwards else 0
                bar.set_postfix_str(f"{s.tokens / spent:.0f} tokens/s, {rate:.1f} a forward")
            if self._stop.late:
                break
        s.slots, s.slot_use = engine.slots, engine.use.share

    def _write(self, line: Line, answer: Answer) -> None:
        s = self.summary
        self._results.write(result(line, answer, self._tokenizer, self._name))
        s.results, s.errors = s.results + (answer.error is None), s.errors + (answer.error is not None)
        s.prompt_tokens, s.tokens = s.prompt_tokens + len(answer.request.prompt), s.tokens + len(answer.tokens)
        s.denoiser_forwards += answer.forwards[0]
        s.context_forwards += answer.forwards[1]
        s.forwards += counted(answer.request.mode, *answer.forwards)


@dataclasses.dataclass(frozen=True)
class _Class:
    """Lines that one engine answers: their blocks, the longest request, how many there are, and its slots."""

    block: int
    longest: int
    count: int
    slots: int


class _Classes:
    """The lines that are to be answered, so that long requests and blocks do not cost short ones their slots."""

    def __init__(self, model: Model, dtype: np.dtype, options: Options):
        self._towers, self._dtype, self._options = model.towers, dtype, options
        self._kind: dict[int, tuple[int, int]] = {}  # a line's block, and its length's power of two
        self._longest: collections.Counter[tuple[int, int]] = collections.Counter()
        self.kinds = Kinds()  # what they ask
        self._prefix: dict[tuple[int, int], np.ndarray] = {}
        self._class: dict[tuple[int, int], _Class] = {}

    def add(self, number: int, request: Request) -> None:
        kind = sizes.block_of(request.block), max(request.positions, 1).bit_length()
        self._kind[number] = kind
        self._longest[kind] = max(self._longest[kind], request.positions)
        self.kinds = self.kinds.including(request)
        self._prefix[kind] = common(self._prefix.get(kind, request.prompt), request.prompt[: request.read_first])

    def found(self) -> list[_Class]:
        """All classes, the shortest first. Lengths are of one class if as many slots fit for the longest as for the
        shortest, and it is not much longer: all rows of a class pay for the attention of the longest.
        """
        counts = collections.Counter(self._kind.values())
        groups: list[tuple[list[tuple[int, int]], int]] = []  # kinds, slots
        for kind in sorted(counts, reverse=True):
            slots = self._slots(kind)
            longest = groups[-1][0][0] if groups else (0, 0)
            alike = longest[0] == kind[0] and (1 << longest[1] <= LONG or longest[1] - kind[1] < 3)
            if alike and slots <= groups[-1][1]:
                groups[-1][0].append(kind)
            else:
                groups.append(([kind], slots))
        for kinds, slots in groups:
            count, longest = sum(counts[kind] for kind in kinds), max(self._longest[kind] for kind in kinds)
            self._class |= dict.fromkeys(kinds, _Class(kinds[0][0], longest, count, slots))
        return [self._class[kinds[0]] for kinds, _ in reversed(groups)]

    def _slots(self, kind: tuple[int, int]) -> int:
        wish = {"longest": self._longest[kind], "block_size": kind[0], "slots": self._options.slots}
        return sizes.plan(self._towers, self._dtype, room=self._options.memory, **wish)[0]

    def prefix(self, class_: _Class) -> np.ndarray:
        """What the prompts of a class begin with in common."""
        return functools.reduce(common, [self._prefix[kind] for kind, own in self._class.items() if own == class_])

    def of(self, number: int) -> _Class | None:
        """A line's class; None if it is not to be answered."""
        return self._class[self._kind[number]] if number in self._kind else None


def _hidden() -> bool | None:
    """Of progress bars: None hides them where there is no terminal."""
    return None if distributed.first() else True

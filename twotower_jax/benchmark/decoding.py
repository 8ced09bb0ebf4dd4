"""Tokens per second: through the engine, and what its pieces alone would come to.

Random weights are sure of nothing, so that a block's passes are given: no probability is above the threshold, and a
pass commits its share. A number that is not whole lies between two that were run: of the time, not the rate, in
proportion. Trained weights answer their prompts, by the rules that are the default.
"""

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

from twotower_jax.benchmark.pieces import NEVER
from twotower_jax.engine.request import Request, counted
from twotower_jax.engine.scheduler import Engine
from twotower_jax.errors import InputError
from twotower_jax.model import Model

RUNS = 3
ACCEPTED = 6  # tokens that a verification of a draft of one pass is taken to write
ANSWERS = 4  # of each slot, by a trained model


@dataclasses.dataclass(frozen=True)
class Rate:
    """Tokens per second of all rows together.

    Attributes:
      rows: that are written at a time.
      mode: `ar`, `diffusion` or `verified`.
      schedule: what decides how many passes a block takes.
      source: `engine`, measured; `between runs of the engine`, in proportion; or `pieces`, derived.
      tokens_per_second: of random weights without the first and the last block of a row, of a trained model's answers
        with their prompts: the median of the runs.
      best: the most of the runs; None where they are not the engine's.
      passes_per_block: of the denoiser; None where there is no block.
      with_prompts: tokens per second with the time in which the prompts were read; None where that is not known.
      tokens_per_forward: of trained models; None of others.
    """

    rows: int
    mode: str
    schedule: str
    source: str
    tokens_per_second: float
    best: float | None = None
    passes_per_block: float | None = None
    with_prompts: float | None = None
    tokens_per_forward: float | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """An engine's run.

    Attributes:
      seconds: from the first prompt to the last token.
      tokens: all.
      forwards: all, as `counted`.
      between: seconds from when every row had written `first` tokens to when every row had `last`.
    """

    seconds: float
    tokens: int
    forwards: int
    between: float


def run(
    engine: Engine,
    requests: Sequence[Request],
    first: int = 0,
    last: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Run:
    """Runs requests to their end.

    Raises:
      InputError: a row ended with an error, as the model's do whose logits are not finite.
    """
    written, forwards = {request.key: 0 for request in requests}, {}
    start = clock()
    begun = ended = start
    for event in engine.run(requests):
        if event.error:
            raise InputError(f"row {event.key} cannot be timed: {event.error}")
        before = min(written.values())
        written[event.key] += len(event.tokens)
        forwards[event.key] = counted(requests[0].mode, event.denoiser_forwards, event.context_forwards)
        least, now = min(written.values()), clock()
        begun = now if before < first <= least else begun
        ended = now if before < last <= least else ended
    return Run(clock() - start, sum(written.values()), sum(forwards.values()), ended - begun)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """AR and diffusion of random weights.

    Attributes:
      rows: that are written at a time, all of them together.
      prompts: (rows or more, L) token ids.
      new_tokens: of each row, a multiple of the block size, three blocks or more: neither the first nor the last, which
        is never committed, is timed.
      block_size: S.
      passes: a block, from 1 to S.
    """

    rows: int
    prompts: Sequence[Sequence[int]]
    new_tokens: int
    block_size: int
    passes: Sequence[float]

    def begin(self, model: Model) -> None:
        """Has all programs begin to compile."""
        for mode in ("ar", "diffusion") if model.two_towers else ("ar",):
            model.rehearse(self._requests(model, mode), slots=self.rows)

    def rates(self, model: Model) -> Iterator[Rate]:
        """As they are measured; of both towers, or of a backbone."""
        yield Rate(self.rows, "ar", "a token a pass", "engine", **self._summed(self._runs(model, "ar")))
        if not model.two_towers:
            return
        by_passes = {}
        for n in sorted({n for p in self.passes for n in (math.floor(p), math.ceil(p))}):
            made = self._runs(model, "diffusion", n)
            taken = made[0].forwards / (made[0].tokens / self.block_size)
            about = self._summed(made) | {"passes_per_block": taken}
            by_passes[n] = Rate(self.rows, "diffusion", f"{n} passes a block", "engine", **about)
            yield by_passes[n]
        for p in self.passes:
            if p not in by_passes:
                yield between(p, by_passes)

    def _requests(self, model: Model, mode: str, steps: int = 1) -> list[Request]:
        asked = {"mode": mode, "max_new_tokens": self.new_tokens, "block_size": self.block_size}
        asked |= {"steps_per_block": steps, "confidence_threshold": NEVER}
        made = (Request(i, p, row=i, **asked) for i, p in enumerate(self.prompts[: self.rows]))
        return [request.checked(model.config.vocab_size, model.two_towers) for request in made]

    @property
    def _timed(self) -> tuple[int, int]:
        """The first token, and the last."""
        return self.block_size, self.new_tokens - self.block_size

    def _runs(self, model: Model, mode: str, steps: int = 1) -> list[Run]:
        return runs(model, self._requests(model, mode, steps), self.rows, *self._timed)

    def _summed(self, made: Sequence[Run]) -> dict[str, float]:
        first, last = self._timed
        rates = [self.rows * (last - first) / one.between for one in made]
        whole = statistics.median(one.tokens / one.seconds for one in made)
        return {"tokens_per_second": statistics.median(rates), "best": max(rates), "with_prompts": whole}


def between(passes: float, measured: dict[int, Rate]) -> Rate:
    """The rate at a number of passes between two whole ones: a token's time is between theirs in proportion."""
    low, high = measured[math.floor(passes)], measured[math.ceil(passes)]
    share = passes - math.floor(passes)

    def mixed(one: float, other: float) -> float:
        return 1 / ((1 - share) / one + share / other)

    return Rate(
        low.rows,
        "diffusion",
        f"{passes:g} passes a block",
        "between runs of the engine",
        mixed(low.tokens_per_second, high.tokens_per_second),
        passes_per_block=(1 - share) * low.passes_per_block + share * high.passes_per_block,
        with_prompts=mixed(low.with_prompts, high.with_prompts),
    )


def from_pieces(rows: int, seconds: dict[str, float], block_size: int, passes: Sequence[float]) -> list[Rate]:
    """What the pieces alone come to: a commit of all rows after so many passes; and of verified decoding, of which
    random weights show nothing, at `ACCEPTED` tokens for a pass of each tower.

    Args:
      rows: B.
      seconds: by the piece's name.
      block_size: S.
      passes: a block.
    """
    found = [Rate(rows, "ar", "a token a pass", "pieces", rows / seconds["AR step"])]
    if "denoiser pass" not in seconds:
        return found
    one, reading = seconds["denoiser pass"], seconds["commit"]
    for p in passes:
        rate = rows * block_size / (p * one + reading)
        found.append(Rate(rows, "diffusion", f"{p:g} passes a block", "pieces", rate, passes_per_block=p))
    rate = rows * ACCEPTED / (one + seconds["verify"])
    schedule = f"1 pass a draft, {ACCEPTED} tokens a verification"
    return [*found, Rate(rows, "verified", schedule, "pieces", rate, passes_per_block=1)]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model that answers prompts, `ANSWERS` times as many as rows, by the default rules.

    Attributes:
      rows: that are written at a time.
      prompts: token ids.
      new_tokens: of an answer at most.
    """

    rows: int
    prompts: Sequence[Sequence[int]]
    new_tokens: int

    def begin(self, model: Model) -> None:
        """Has all programs begin to compile."""
        for requests in self._requests(model):
            model.rehearse(requests, slots=self.rows)

    def rates(self, model: Model) -> Iterator[Rate]:
        """As they are measured; of both towers, or of a backbone."""
        for requests in self._requests(model):
            mode, made = requests[0].mode, runs(model, requests, self.rows)
            rates = [one.tokens / one.seconds for one in made]
            schedule = {"ar": "a token a pass", "diffusion": "threshold 0.8", "verified": "as many passes as pay"}[mode]
            best, middle = max(rates), statistics.median(rates)
            about = {"with_prompts": middle, "tokens_per_forward": made[0].tokens / made[0].forwards}
            yield Rate(self.rows, mode, schedule, "engine", middle, best, **about)

    def _requests(self, model: Model) -> Iterator[list[Request]]:
        """Of each mode."""
        asked = list(itertools.islice(itertools.cycle(self.prompts), ANSWERS * self.rows))
        ends = {"max_new_tokens": self.new_tokens, "eos_token_id": model.config.eos_token_ids}
        for mode in ("ar", "diffusion", "verified") if model.two_towers else ("ar",):
            made = (Request(i, p, mode, **ends) for i, p in enumerate(asked))
            yield [request.checked(model.config.vocab_size, model.two_towers) for request in made]


def runs(model: Model, requests: Sequence[Request], rows: int, first: int = 0, last: int = 0) -> list[Run]:
    """`RUNS` runs, after one that is not counted, in which what was not begun before is compiled."""
    made = []
    for _ in range(1 + RUNS):
        made.append(run(model.engine_for(requests, slots=rows), requests, first, last))
        model.programs.finish()
    return made[1:]

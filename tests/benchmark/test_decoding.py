"""Tokens per second: what is counted between which moments, and schedules that take the passes they claim."""

import dataclasses

import pytest

from twotower_jax.benchmark import decoding
from twotower_jax.benchmark.decoding import Rate
from twotower_jax.engine.request import Event, Request
from twotower_jax.errors import InputError


class Engine:
    """Rows that write so many tokens at each moment."""

    def __init__(self, written):
        self.written, self.now = written, 0.0

    def run(self, requests):
        for moment, key, tokens in self.written:
            self.now = moment
            yield Event(key, list(range(tokens)), [], None, None, int(moment), 1)

    def clock(self):
        return self.now


def test_run():
    """The clock starts when the last row has its first 16 tokens, and stops when the last has 32."""
    events = [(2, 0, 16), (3, 1, 16), (4, 0, 16), (7, 1, 16), (8, 0, 16), (9, 1, 16)]
    engine = Engine(events)
    found = decoding.run(engine, [Request(0, [5]), Request(1, [5])], 16, 32, clock=engine.clock)
    assert (found.seconds, found.between, found.tokens) == (9.0, 4.0, 96)
    assert found.forwards == 8 + 9


def test_a_row_that_fails():
    engine = Engine([])
    engine.run = lambda requests: iter([Event(0, [], [], "error", "a logit was not finite", 1, 1)])
    with pytest.raises(InputError, match="row 0 cannot be timed: a logit was not finite"):
        decoding.run(engine, [Request(0, [5])])


def test_passes(small, small_rows, hasty):
    """A schedule takes exactly the passes that it is named for, on the mean over all blocks and rows."""
    asked = decoding.Fixed(2, small_rows.tokens[:, :32], 48, 16, [1.0, 5.4, 16.0])
    asked.begin(small.model())
    begun = set(small.programs._begun)
    found = list(asked.rates(small.model()))
    assert set(small.programs._begun) == begun  # everything was known ahead
    by_schedule = {rate.schedule: rate for rate in found}
    assert set(by_schedule) == {"a token a pass", *(f"{n} passes a block" for n in ("1", "5", "5.4", "6", "16"))}
    for n in (1, 5, 6, 16):
        assert by_schedule[f"{n} passes a block"].passes_per_block == n
        assert by_schedule[f"{n} passes a block"].source == "engine"
    assert by_schedule["5.4 passes a block"].passes_per_block == pytest.approx(5.4)
    assert by_schedule["5.4 passes a block"].source == "between runs of the engine"
    assert all(rate.tokens_per_second > 0 and rate.with_prompts > 0 for rate in found)


def test_between():
    """At a part of a pass the time is in proportion: 16 tokens in 5 or 6 s, so in 5.4 s."""
    five = Rate(1, "diffusion", "", "engine", 16 / 5, passes_per_block=5, with_prompts=16 / 5)
    six = dataclasses.replace(five, tokens_per_second=16 / 6, with_prompts=16 / 6, passes_per_block=6)
    found = decoding.between(5.4, {5: five, 6: six})
    assert found.tokens_per_second == pytest.approx(16 / 5.4)
    assert found.passes_per_block == pytest.approx(5.4)


def test_from_pieces():
    seconds = {"AR step": 0.5, "denoiser pass": 1.0, "commit": 2.0, "verify": 3.0}
    ar, diffusion, verified = decoding.from_pieces(4, seconds, 16, [6.0])
    assert ar.tokens_per_second == 8
    assert diffusion.tokens_per_second == 4 * 16 / 8
    assert verified.tokens_per_second == 4 * 6 / 4
    assert {rate.source for rate in (ar, diffusion, verified)} == {"pieces"}
    assert len(decoding.from_pieces(4, {"AR step": 0.5}, 16, [6.0])) == 1

"""Clocks without time: what is measured is what the arrays took to be there."""

import pytest

from twotower_jax.benchmark import clock


class Late:
    """An array that is there so many seconds after somebody waits for it."""

    def __init__(self, took):
        self.took, self.now, self.started = list(took), 0.0, 0

    def start(self):
        self.started += 1
        return [self]

    def block_until_ready(self):
        self.now += self.took.pop(0)

    def clock(self):
        return self.now


def test_waits_for_the_result():
    late = Late([5.0, 1.0, 1.0, 3.0, 2.0])
    found = clock.seconds(late.start, samples=3, clock=late.clock)
    assert (found.median, found.least) == (2.0, 1.0)
    assert late.started == 5


def test_short_work_is_repeated():
    late = Late([clock.SHORTEST / 8] * 100)
    assert clock.seconds(late.start, samples=3, clock=late.clock).median == pytest.approx(clock.SHORTEST / 8)
    assert late.started == 2 + 3 * 8

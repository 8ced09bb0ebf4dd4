"""How many rows fit."""

import pytest

from twotower_jax.plan import Plan
from twotower_jax.plan_report import largest_rows

WEIGHTS, ROW, ROOM = 60_000, 100, 82_450


def plan_of(needed):
    weights = {"context": WEIGHTS, "denoiser": WEIGHTS}
    return Plan({}, weights, {}, {"context": needed - 500, "denoiser": needed}, {})


SHAPES = {
    "a line": lambda rows: 1_000 + ROW * rows,
    "bent up": lambda rows: 20 * rows + 0.3 * rows**2,
    "bent once": lambda rows: ROW * (rows + max(0, rows - 100)),
    "in tiles": lambda rows: ROW * 64 * -(-rows // 64),
}


@pytest.mark.parametrize("begin", [4, 32, 64, 400])
@pytest.mark.parametrize("shape", SHAPES)
def test_most_rows(shape, begin):
    """What is found fits, and is nearly all that does, whether or not memory grows by as much with every row."""

    def make(rows):
        return plan_of(WEIGHTS + SHAPES[shape](rows))

    found = largest_rows(make, begin, 2, ROOM)
    most = max(rows for rows in range(0, 1000, 2) if max(make(rows).needed.values()) <= ROOM)
    assert 0.9 * most <= found <= most
    assert shape != "a line" or found >= 0.96 * most


def test_a_compiler_that_refuses():
    """As TPU compilers do with what does not fit."""

    def make(rows):
        return None if rows > 100 else plan_of(WEIGHTS + ROW * rows)

    assert 90 <= largest_rows(make, 400, 2, ROOM) <= 100


def test_nothing_fits():
    assert largest_rows(lambda rows: plan_of(WEIGHTS + ROW * rows), 4, 4, WEIGHTS) == 0
    assert largest_rows(lambda rows: None, 64, 4, ROOM) == 0

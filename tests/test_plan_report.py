"""How many rows fit."""

import pytest

from twotower_jax.plan import Plan
from twotower_jax.plan_report import USABLE, largest_rows

WEIGHTS, ROW, MEMORY = 60_000, 100, 85_000


def plan_of(rows, fixed=1_000, bend=10**9):
    """The denoiser needs `fixed` bytes beside weights and rows, and twice as much for every row from `bend` on."""
    needed = WEIGHTS + fixed + ROW * (rows + max(0, rows - bend))
    return Plan(
        {}, dict.fromkeys(("context", "denoiser"), WEIGHTS), {}, {"context": needed - 500, "denoiser": needed}, {}
    )


@pytest.mark.parametrize("rows", [2, 32, 214])
@pytest.mark.parametrize("step", [2, 16])
def test_most_rows_of_a_line(rows, step):
    found, best = largest_rows(plan_of, plan_of(rows), rows, step, MEMORY)
    room = USABLE * MEMORY
    assert best.needed["denoiser"] <= room < plan_of(found + step).needed["denoiser"]
    assert found % step == 0 or found == rows


def test_from_rows_that_do_not_fit():
    found, best = largest_rows(plan_of, plan_of(400), 400, 2, MEMORY)
    assert (found, best) == (214, plan_of(214))


def test_a_bend_is_not_believed():
    """A number of rows is said to fit only if its own plan does."""

    def bent(rows):
        return plan_of(rows, bend=100)

    found, best = largest_rows(bent, bent(32), 32, 2, MEMORY)
    assert best == bent(found)
    assert best.needed["denoiser"] <= USABLE * MEMORY


def test_nothing_fits():
    assert largest_rows(plan_of, plan_of(4), 4, 4, WEIGHTS) == (0, None)

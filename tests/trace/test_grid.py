"""What is drawn says what was recorded: which pass wrote what, and what became of it."""

import pytest
from traces import ar_row, block, diffusion_row, verified_row

from twotower_jax.trace.grid import births, grid, outcome, steps
from twotower_jax.trace.record import Block, Pass, Row
from twotower_jax.trace.words import counts


def states(line):
    return "".join(cell.state[0] for cell in line)


def test_a_pass_writes_what_is_masked_before_it_and_not_after():
    lines = grid(block(0, 2, 0, 1))
    assert [states(line) for line in lines] == ["wmwm", "fmfw", "fwff"]
    assert [cell.born for cell in lines[-1]] == [0, 2, 0, 1]


def test_a_position_that_is_masked_again_belongs_to_the_pass_that_wrote_it_last():
    masked = [[True, True], [False, True], [True, True]]
    passes = [Pass([7 + n, 8], [0.5, 0.5], m) for n, m in enumerate(masked)]
    lines = grid(Block(0, passes, [9, 8], 0, 2, None))
    assert [states(line) for line in lines] == ["wm", "fm", "ww"]
    assert lines[1][0].token == 7
    assert lines[2][0].token == 9
    assert lines[2][0].born == 2


def test_a_pass_that_failed_writes_nothing():
    failed = Block(0, [Pass([1, 2], [0.5, 0.5], [True, True])], [3, 3], 0, 0, None)
    assert states(grid(failed)[0]) == "mm"
    assert states(outcome(failed)) == "mm"


def test_a_token_that_was_drawn_is_shown_without_another_ones_confidence():
    drawn = grid(Block(0, [Pass([1, 2], [0.5, 0.6], [True, True])], [1, 7], 0, 2, None))[0]
    assert [(cell.token, cell.confidence) for cell in drawn] == [(1, 0.5), (7, None)]


def test_drafts_of_an_earlier_block():
    held = Block(3, [], [5, 6, 7], 1, 2, 8)
    assert states(outcome(held)) == "gttc"
    alone = Block(0, [], [5], 1, 0, 6)
    row = Row([9], "verified", [6, 6, 7, 8], [0.5] * 4, [alone, held], "length", (0, 3))
    assert births(row) == [(0, None), (1, 0), (1, 0), (1, None)]


def test_what_becomes_of_drafts():
    assert [states(outcome(b)) for b in verified_row().blocks] == ["gc", "gtcr", "gtttc", "gttc", "gttd"]


@pytest.mark.parametrize("row", [diffusion_row(block(0, 1), block(1, 0, kept=1)), verified_row(), ar_row()])
def test_every_token_is_born_once_and_in_order_of_blocks(row):
    found = births(row)
    assert len(found) == len(row.tokens)
    assert all(0 <= step < len(steps(row)) for step, _ in found)
    assert sorted(steps(row)) == steps(row)


def test_drafts_are_counted():
    assert "8 drafts accepted, 2 rejected" in counts(verified_row())


def test_births_are_the_passes_that_wrote():
    row = diffusion_row(block(0, 1, 1), block(2, 0, 1, start=3, kept=2))
    assert births(row) == [(0, 0), (1, 1), (1, 1), (4, 2), (2, 0)]


def test_drafts_become_text_when_they_are_checked():
    found = births(verified_row())
    assert [step for step, _ in found] == [0, 3, 3, 6, 6, 6, 6, 7, 7, 7, 10, 10]
    assert [born for _, born in found] == [None, 0, None, 0, 0, 1, None, 0, 0, None, 0, 0]

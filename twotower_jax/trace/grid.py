"""What of a row is drawn: each block as a grid, a line for each pass; and in which order it came to be."""

import dataclasses

from twotower_jax.trace.record import Block, Row

STATES = {
    "given": "g",
    "masked": "m",  # before the pass and after it
    "written": "w",  # in this pass
    "fixed": "f",  # in an earlier one, or drafted before the block
    "text": "t",  # became text
    "dropped": "d",  # did not: after the row's end
    "rejected": "r",  # did not: the context tower would have written something else
    "correction": "c",  # written by the context tower
}
"""Of a cell; a letter for each."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One position at one time.

    Attributes:
      state: one of `STATES`.
      token: its id; of a masked position the one that the pass predicts.
      confidence: the probability that it had when it was predicted; None if that is not known.
      born: the pass that wrote it, from 0; None while it is masked, and if no pass of this block did.
    """

    state: str
    token: int
    confidence: float | None = None
    born: int | None = None


def grid(block: Block) -> list[list[Cell]]:
    """The cells (passes, S) of a block.

    A position that is written for good holds the block's token, which above temperature 0 need not be the predicted
    one; its confidence is then not known.
    """
    known, lines = _known(block), []
    for number, (one, after) in enumerate(zip(block.passes, _masked_after(block), strict=True)):
        line = []
        for place, (guess, confidence, masked) in enumerate(
            zip(one.predicted, one.confidence, one.masked, strict=True)
        ):
            if not masked:
                line.append(known[place])
            elif after[place]:
                line.append(Cell("masked", guess, confidence))
            else:
                final = not any(later.masked[place] for later in block.passes[number + 1 :])
                token = block.tokens[place] if final else guess
                line.append(Cell("written", token, confidence if token == guess else None, number))
                known[place] = dataclasses.replace(line[-1], state="fixed")
        lines.append(line)
    return lines


def _known(block: Block) -> list[Cell]:
    """The cells before the first pass, as far as they are not masked."""
    return [Cell("given" if place < block.given else "fixed", token) for place, token in enumerate(block.tokens)]


def _masked_after(block: Block) -> list[list[bool]]:
    """Which positions are masked after each pass, (passes, S): after the last none, or as before it if it failed."""
    if not block.passes:
        return []
    last = block.passes[-1].masked
    failed = block.given == block.kept == 0
    return [one.masked for one in block.passes[1:]] + [last if failed else [False] * len(last)]


def outcome(block: Block) -> list[Cell]:
    """What became of a block: a cell for each position, and one more where the context tower wrote beyond its end."""
    end = block.given + block.kept
    away = "dropped" if block.correction is None else "rejected"
    cells = []
    for place, cell in enumerate(grid(block)[-1] if block.passes else _known(block)):
        state = cell.state if cell.state in ("given", "masked") else "text" if place < end else away
        cells.append(dataclasses.replace(cell, state=state))
    if block.correction is not None:
        cells[end : end + 1] = [Cell("correction", block.correction)]
    return cells


def steps(row: Row) -> list[tuple[int, int]]:
    """In order, (block, pass); a pass beyond the last is the context tower's, which checks drafts.

    Where one token is written at a time, (token, 0).
    """
    if not row.blocks:
        return [(number, 0) for number in range(len(row.tokens))]
    checked = int(row.mode == "verified")
    return [(number, one) for number, block in enumerate(row.blocks) for one in range(len(block.passes) + checked)]


def births(row: Row) -> list[tuple[int, int | None]]:
    """Of each new token, (N,), the index of the step after which it is text, and the pass of its block that wrote it:
    the first if it was drafted before the block, None if the context tower wrote it.
    """
    if not row.blocks:
        return [(number, 0 if row.mode == "mock-ar" else None) for number in range(len(row.tokens))]
    at = {step: number for number, step in enumerate(steps(row))}
    found = []
    for number, block in enumerate(row.blocks):
        checks = len(block.passes)
        for cell in outcome(block):
            if cell.state == "text":
                born = cell.born or 0
                found.append((at[number, checks if row.mode == "verified" else born], born))
            elif cell.state == "correction":
                found.append((at[number, checks], None))
    return found[: len(row.tokens)]


def slowest(row: Row) -> int:
    """The passes of the block that took the most, 1 or more."""
    return max((len(block.passes) for block in row.blocks), default=1) or 1

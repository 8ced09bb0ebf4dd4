"""What of a row is drawn: each block as a grid, a line for each pass; and in which order it came to be."""

import dataclasses

from twotower_jax.trace.record import Block, Row

STATES = {
    "given": "g",
    "masked": "m",  # before the pass and after it
    "written": "w",  # in this pass
    "fixed": "f",  # in an earlier one
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
      confidence: the probability that it had when it was predicted; None if nobody said.
      born: the pass that wrote it, from 0; None while masked, and if no pass did.
    """

    state: str
    token: int
    confidence: float | None = None
    born: int | None = None


def grid(block: Block) -> list[list[Cell]]:
    """The cells (passes, S) of a block."""
    known = [Cell("given", token) if place < block.given else None for place, token in enumerate(block.tokens)]
    lines = []
    for number, (one, after) in enumerate(zip(block.passes, _masked_after(block), strict=True)):
        line = []
        for place, (token, confidence, masked) in enumerate(
            zip(one.predicted, one.confidence, one.masked, strict=True)
        ):
            if not masked:
                line.append(known[place] or Cell("fixed", block.tokens[place]))
            elif after[place]:
                line.append(Cell("masked", token, confidence))
            else:
                line.append(Cell("written", token, confidence, number))
                known[place] = dataclasses.replace(line[-1], state="fixed")
        lines.append(line)
    return lines


def _masked_after(block: Block) -> list[list[bool]]:
    """Which positions are masked after each pass, (passes, S); those of a pass that failed stay so."""
    if not block.passes:
        return []
    last = block.passes[-1]
    left = [m and a != b for m, a, b in zip(last.masked, last.predicted, block.tokens, strict=True)]
    return [one.masked for one in block.passes[1:]] + [left]


def outcome(block: Block) -> list[Cell]:
    """What became of a block: a cell for each position, and one more where the context tower wrote beyond its end."""
    line = grid(block)[-1] if block.passes else [Cell("given", token) for token in block.tokens]
    end = block.given + block.kept
    away = "dropped" if block.correction is None else "rejected"
    cells = []
    for place, cell in enumerate(line):
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
    None if the context tower did.
    """
    if not row.blocks:
        return [(number, 0 if row.mode == "mock-ar" else None) for number in range(len(row.tokens))]
    at = {step: number for number, step in enumerate(steps(row))}
    found = []
    for number, block in enumerate(row.blocks):
        for cell in outcome(block):
            if cell.state == "text":
                checked = row.mode == "verified"
                found.append((at[number, len(block.passes) if checked else cell.born or 0], cell.born))
            elif cell.state == "correction":
                found.append((at[number, len(block.passes)], None))
    return found[: len(row.tokens)]


def slowest(row: Row) -> int:
    """The passes of the block that took the most, 1 or more."""
    return max((len(block.passes) for block in row.blocks), default=1) or 1

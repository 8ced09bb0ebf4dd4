"""A row's picture: its text, and its blocks as grids or its tokens as a strip."""

import dataclasses
import functools

from twotower_jax.trace import words
from twotower_jax.trace.cells import CELL, EDGE, GAP, HOLE, INK, MARGIN, NARROW, OWN, PANEL, SOFT, centred, draw_cell
from twotower_jax.trace.colours import LATE, SURE, ink, late, sure
from twotower_jax.trace.grid import Cell, births, grid, outcome, slowest, steps
from twotower_jax.trace.labels import label
from twotower_jax.trace.record import Block, Row, Trace
from twotower_jax.trace.sheet import Sheet, cut, spelt, width

BLOCKS, LINES, PASSES, COLUMNS, TOKENS = 8, 48, 32, 32, 128  # the most that is drawn of a row
SIDE, WIDEST = 132, 88  # of the lines' names, of a column


@dataclasses.dataclass(frozen=True)
class Table:
    """A block as it is drawn: the lines' names and shares of masks, cells, and the columns' widths."""

    block: Block
    names: list[str]
    shares: list[float | None]
    lines: list[list[Cell]]
    widths: list[float]

    @property
    def height(self) -> float:
        return 44 + len(self.lines) * (CELL + GAP)


class Picture:
    """One row of a trace.

    Attributes:
      row: the row.
      tables: of the blocks that are drawn.
      drawn: the new tokens that are.
      steps: the steps that are; see `grid.steps`.
      width: that the widest part needs.
      left_out: what is not drawn, or nothing.
    """

    def __init__(self, trace: Trace, row: Row):
        self.row, self._pieces, self._slowest = row, trace.pieces, slowest(row)
        lines, self.tables = 0, []
        for block in row.blocks[:BLOCKS]:
            table = self._table(block)
            lines += len(table.lines)
            if self.tables and lines > LINES:
                break
            self.tables.append(table)
        count = len(self.tables)
        if row.blocks:
            self.drawn = row.blocks[count].start if count < len(row.blocks) else len(row.tokens)
        else:
            self.drawn = min(len(row.tokens), TOKENS)
        shown = count if row.blocks else self.drawn
        self.steps = [step for step in steps(row) if step[0] < shown]
        self.births = births(row)[: self.drawn]
        widest = max((sum(table.widths) + GAP * len(table.widths) for table in self.tables), default=0)
        self.width = max(760, SIDE + widest + 138 + 2 * MARGIN)
        self.left_out = self._left_out()

    def _left_out(self) -> str:
        row, limits = self.row, []
        if len(self.tables) < len(row.blocks):
            limits.append(f"first {len(self.tables)} of {len(row.blocks):,} blocks")
        if not row.blocks and self.drawn < len(row.tokens):
            limits.append(f"first {self.drawn} of {len(row.tokens):,} tokens")
        blocks = [table.block for table in self.tables]
        if (most := max((len(block.tokens) for block in blocks), default=0)) > COLUMNS:
            limits.append(f"first {COLUMNS} of {most:,} positions")
        if (most := max((len(block.passes) for block in blocks), default=0)) > PASSES:
            limits.append(f"first {PASSES} of {most:,} passes")
        return ", ".join(limits)

    def _table(self, block: Block) -> Table:
        checked = self.row.mode == "verified"
        lines = grid(block)[:PASSES]
        names = [f"pass {number + 1}" for number in range(len(lines))]
        shares = [sum(one.masked) / max(len(one.masked), 1) for one in block.passes[:PASSES]]
        names, shares = [*names, "context tower" if checked else "text"], [*shares, None]
        lines = [line[: COLUMNS + (len(line) > len(block.tokens))] for line in [*lines, outcome(block)]]
        columns = max(map(len, lines))
        widths = [
            max([NARROW, *(width(self.label(line[at].token), 15) + 12 for line in lines if at < len(line))])
            for at in range(columns)
        ]
        return Table(block, names, shares, lines, widths)

    def label(self, token: int) -> str:
        """A token as a cell shows it."""
        return _label(self._pieces[token], token)

    def draw(self, sheet: Sheet, y: float, done: int, *, only: int | None = None) -> float:
        """The text and the blocks after so many steps, from y on; where it ends.

        Args:
          sheet: to draw on.
          y: of the upper edge.
          done: steps that are done.
          only: the block to draw; all of them unless it is given.
        """
        y = self._text(sheet, y, done) + 14
        if not self.row.blocks:
            return self._strip(sheet, y, done)
        for number, table in enumerate(self.tables):
            if only is None or only == number:
                self._block(sheet, y, number, table, done)
                y += table.height + 14
        return y

    def _text(self, sheet: Sheet, y: float, done: int) -> float:
        """The prompt and the new tokens, tinted by the pass that wrote them."""
        filling = self.steps[done - 1][0] if done and self.row.mode == "diffusion" else 0
        x, right, top = MARGIN, self.width - MARGIN, y
        prompt = "".join(self.label(token) for token in self.row.prompt).replace("␣", " ")
        prompt = "…" + prompt[-160:] if len(prompt) > 160 else prompt
        runs = [(character, None, None) for character in prompt]
        for token, (step, born) in zip(self.row.tokens, self.births, strict=False):
            if step < done:
                runs.append((self.label(token).replace("␣", " "), self._tint(born, len(runs) - len(prompt)), None))
            elif self.row.mode == "diffusion" and self.steps[step][0] == filling:
                runs.append((self.label(token).replace("␣", " "), None, HOLE))
        if self.drawn < len(self.row.tokens) and done == len(self.steps):
            runs.append(("…", None, None))
        for text, fill, hole in runs:
            w = width(text, 18)
            if x + w > right:
                x, y = MARGIN, y + 32
            if fill:
                sheet.box(x, y, w, 26, fill=fill, round=0)
            elif hole:
                sheet.box(x + 1, y + 4, w - 2, 18, fill=hole, round=2)
            if not hole:
                sheet.text(x, y + 19, cut(text, 18, right - MARGIN), 18, ink(fill) if fill else SOFT)
            x += w
        return max(y + 32, top + 32)

    def _tint(self, born: int | None, place: int) -> str:
        if not self.row.blocks:
            at = sure(self.row.probabilities[place])
            return PANEL if at is None else SURE[at]
        return OWN if born is None else LATE[late(born, self._slowest)]

    def _block(self, sheet: Sheet, y: float, number: int, table: Table, done: int) -> None:
        block, own = table.block, [at for at, step in enumerate(self.steps) if step[0] == number]
        if done < own[0] + bool(number):
            return
        took = f": {words.counted(len(block.passes), 'denoiser pass')}" if done > own[-1] else ""
        sheet.text(MARGIN, y + 14, f"Block {number + 1}{took}", 15, INK)
        sheet.text(MARGIN, y + 36, "position", 11, SOFT)
        sheet.text(MARGIN + 80, y + 36, "masked", 11, SOFT)
        places, x = [], MARGIN + SIDE
        for at, w in enumerate(table.widths):
            name = "last" if at < block.given else f"{block.start + at - block.given + 1}"
            sheet.text(x + (w - width(name, 11)) / 2, y + 36, name, 11, SOFT)
            places.append(x)
            x += w + GAP
        y += 44
        for at, line in enumerate(table.lines):
            last = at == len(table.lines) - 1
            if done > (own[-1] if last else own[at]):
                now = not last and done == own[at] + 1 < len(self.steps)
                self._line(sheet, y, places, table, at, now)
                sheet.text(x + 6, y + 21, self._gain(line, last), 13, SOFT)
            elif done == at == number == 0 and not last:
                sheet.text(MARGIN + 10, y + 21, "start", 14, SOFT)
                for place, w, cell in zip(places, table.widths, line, strict=False):
                    if cell.state == "given":
                        draw_cell(sheet, place, y, w, cell, self.label(cell.token), self._slowest)
                    else:
                        sheet.dashes(place, y, w, CELL, EDGE)
            y += CELL + GAP

    def _line(self, sheet: Sheet, y: float, places: list[float], table: Table, at: int, now: bool) -> None:
        """A pass, or what became of the block; the pass of this very step is marked."""
        name, share = table.names[at], table.shares[at]
        if share is None:
            sheet.text(MARGIN + 10, y + 21, name, 14, INK)
        else:
            tint = LATE[late(at, self._slowest)]
            sheet.box(MARGIN, y, 70, CELL, fill=tint, edge=INK if now else None, thick=2)
            sheet.text(MARGIN + 10, y + 21, name, 14, ink(tint))
            sheet.text(MARGIN + 80, y + 21, f"{int(100 * share + 0.5)} %", 13, SOFT)
        for place, w, cell in zip(places, table.widths, table.lines[at], strict=False):
            draw_cell(sheet, place, y, w, cell, self.label(cell.token), self._slowest)

    def _gain(self, line: list[Cell], last: bool) -> str:
        counts = {state: sum(cell.state == state for cell in line) for state in ("written", "text", "dropped")}
        if not last:
            return f"+{counts['written']}"
        return f"{counts['text']} kept" + (f", {counts['dropped']} after the end" if counts["dropped"] else "")

    def _strip(self, sheet: Sheet, y: float, done: int) -> float:
        """Tokens in the order of their passes, each with its probability."""
        x = MARGIN
        for number in range(self.drawn):
            token, probability = self.row.tokens[number], self.row.probabilities[number]
            w = max(58, width(self.label(token), 15) + 12)
            if x + w > self.width - MARGIN:
                x, y = MARGIN, y + 48
            if number < done:
                fill = self._tint(None, number)
                sheet.box(x, y, w, 44, fill=fill)
                centred(sheet, x, y + 19, w, self.label(token), 15, ink(fill))
                centred(sheet, x, y + 37, w, percent(probability), 12, ink(fill))
            x += w + GAP
        return y + 58


@functools.cache
def _label(piece: str, token: int) -> str:
    return cut(spelt(label(piece, token)), 15, WIDEST - 12)


def percent(probability: float) -> str:
    """`97.2 %`; a question mark if it is no number."""
    return f"{100 * probability:.1f}".removesuffix(".0") + " %" if probability == probability else "?"

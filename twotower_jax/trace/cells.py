"""What the pictures are made of: cells, lines of words, and the key to them."""

from twotower_jax.trace.colours import LATE, SURE, ink, late, sure
from twotower_jax.trace.grid import Cell
from twotower_jax.trace.record import Row
from twotower_jax.trace.sheet import Sheet, width, wrapped

INK, SOFT, FAINT, EDGE, PANEL, HOLE = "#16181d", "#555c68", "#676e7a", "#8b93a1", "#f0f2f5", "#d6dae0"
OWN, AWAY = "#7a2e9e", "#9c2f1f"

MARGIN, CELL, NARROW, GAP = 24, 32, 34, 4


def draw_cell(sheet: Sheet, x: float, y: float, w: float, cell: Cell, text: str, passes: int) -> None:
    """One position at one time, its left upper corner at x, y; the slowest block took so many passes."""
    at, colour, struck = sure(cell.confidence), SOFT, False
    if cell.state == "masked":
        sheet.dashes(x, y, w, CELL, EDGE)
        colour = FAINT
        if at is not None:
            sheet.box(x + 2, y + CELL - 7, max((w - 4) * cell.confidence, 3), 5, fill=SURE[at], edge=EDGE, round=0)
    elif cell.state == "written":
        fill = PANEL if at is None else SURE[at]
        sheet.box(x - 1, y - 1, w + 2, CELL + 2, fill=fill, edge=INK, thick=2)
        colour = ink(fill)
    elif cell.state in ("fixed", "given"):
        sheet.box(x, y, w, CELL, fill=PANEL)
    elif cell.state == "text":
        fill = LATE[late(cell.born or 0, passes)]
        sheet.box(x, y, w, CELL, fill=fill)
        colour = ink(fill)
    elif cell.state == "correction":
        sheet.box(x, y, w, CELL, fill=OWN)
        colour = ink(OWN)
    else:
        colour, struck = (AWAY, True) if cell.state == "rejected" else (FAINT, True)
        sheet.box(x, y, w, CELL, edge=AWAY if cell.state == "rejected" else PANEL)
    centred(sheet, x, y + 20, w, text, 15, colour)
    if struck:
        length = width(text, 15) + 6
        sheet.box(x + (w - length) / 2, y + 15, length, 1.5, fill=colour, round=0)


def centred(sheet: Sheet, x: float, y: float, w: float, text: str, size: int, colour: str) -> None:
    """Writes a text in the middle between x and x + w."""
    sheet.text(x + (w - width(text, size)) / 2, y, text, size, colour)


def paragraph(sheet: Sheet, y: float, text: str, size: int, colour: str, most: float) -> float:
    """Lines from y on; where they end."""
    for line in wrapped(text, size, most - 2 * MARGIN):
        y += size * 1.4
        sheet.text(MARGIN, y, line, size, colour)
    return y + size * 0.4


def key(sheet: Sheet, y: float, row: Row, most: float) -> float:
    """The legend of a row's picture, from y on; where it ends."""
    scale, times = [(colour, 14) for colour in SURE[::2]], [(colour, 14) for colour in LATE]
    masked, written = Cell("masked", -1, 0.4), Cell("written", -1, 0.95, 0)
    items: list[tuple] = [([masked], "masked: a guess, and how sure"), ([written], "written in this pass")]
    items += [(scale, "0 to 100 % sure"), ([Cell("fixed", -1)], "written before")]
    if row.mode == "verified":
        items.append(([Cell("rejected", -1), Cell("correction", -1)], "draft rejected; the context tower's token"))
    if row.blocks:
        items.append((times, "text: early to late pass"))
    else:
        items = [(scale, "a token's colour: its probability, 0 to 100 %")]
    x = MARGIN
    for samples, text in items:
        wide = sum(NARROW + GAP if isinstance(sample, Cell) else sample[1] for sample in samples)
        if x + wide + width(text, 14) > most - MARGIN:
            x, y = MARGIN, y + CELL + 10
        for sample in samples:
            if isinstance(sample, Cell):
                draw_cell(sheet, x, y, NARROW, sample, "a", 1)
                x += NARROW + GAP
            else:
                sheet.box(x, y + 7, sample[1], 18, fill=sample[0], round=0)
                x += sample[1]
        x = sheet.text(x + 6, y + 21, text, 14, INK) + 26
    return y + CELL + MARGIN

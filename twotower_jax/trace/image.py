"""A trace as one picture, and as a film: a frame for each pass."""

import functools
import io
from collections.abc import Callable

from PIL import Image, ImageColor

from twotower_jax.trace import words
from twotower_jax.trace.cells import AWAY, EDGE, FAINT, HOLE, INK, MARGIN, OWN, PANEL, SOFT, key, paragraph
from twotower_jax.trace.colours import LATE, SURE, ink
from twotower_jax.trace.layout import Picture
from twotower_jax.trace.record import Trace
from twotower_jax.trace.sheet import SCALE, Sheet

ROWS = 3  # of a trace, that a PNG shows
TOGETHER = 16  # lines of blocks that a GIF shows all at once; of more, one block at a time
FIRST, PASS, LAST, FILM = 1500, 1000, 5000, 40_000  # ms: the first frame, each pass, the last; at most of all passes


def png(trace: Trace) -> bytes:
    """Each block with all of its passes, of the first `ROWS` rows."""
    pictures = [Picture(trace, row) for row in trace.rows[:ROWS]]
    wide = max((picture.width for picture in pictures), default=600)
    for picture in pictures:
        picture.width = wide

    def page(sheet: Sheet) -> float:
        y = _heading(sheet, trace, len(pictures), wide)
        for number, picture in enumerate(pictures):
            if number == 0 or picture.row.mode != pictures[number - 1].row.mode:
                y = paragraph(sheet, y, words.ABOUT[picture.row.mode], 15, INK, wide) + 10
            if picture.left_out:
                y = paragraph(sheet, y, f"Drawn: {picture.left_out}.", 14, SOFT, wide) + 6
            y = picture.draw(sheet, y, len(picture.steps))
            y = paragraph(sheet, y, _told(picture), 15, INK, wide) + 14
        return key(sheet, y, pictures[0].row, wide) if pictures else y + MARGIN

    return _saved(_painted(page, wide, page(Sheet())), "PNG")


def gif(trace: Trace) -> bytes:
    """The first row: a frame before the first pass, one after each, and the end."""
    if not trace.rows:
        return _saved(_painted(lambda sheet: _heading(sheet, trace, 0, 600), 600, 100), "GIF")
    picture = Picture(trace, trace.rows[0])
    together = sum(len(table.lines) for table in picture.tables) <= TOGETHER

    def page(done: int, told: str) -> Callable[[Sheet], float]:
        def draw(sheet: Sheet) -> float:
            y = _heading(sheet, trace, 1, picture.width, picture.left_out)
            y = paragraph(sheet, y, told, 17, INK, picture.width) + 8
            now = None if together or not picture.steps else picture.steps[max(done - 1, 0)][0]
            return key(sheet, picture.draw(sheet, y, done, only=now) + 6, picture.row, picture.width)

        return draw

    passes = len(picture.steps)
    pages = [page(done, _status(picture, done)) for done in range(passes + 1)] + [page(passes, _told(picture))]
    high = max(draw(Sheet()) for draw in pages)
    frames = [
        _painted(draw, picture.width, high).reduce(SCALE).quantize(palette=_palette(), dither=Image.Dither.NONE)
        for draw in pages
    ]
    times = [FIRST, *[min(PASS, FILM // max(passes, 1))] * passes, LAST]
    return _saved(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)


@functools.cache
def _palette() -> Image.Image:
    """What is drawn with, and the edges between: the same in every frame, so that nothing flickers."""
    fills, words = [*SURE, *LATE, PANEL, HOLE, OWN], [INK, SOFT, FAINT, EDGE, AWAY]
    pairs = [(fill, ink(fill)) for fill in fills] + [(colour, "#ffffff") for colour in fills + words]
    pairs += [(fill, INK) for fill in SURE] + [(colour, PANEL) for colour in (SOFT, INK)]
    found = [ImageColor.getrgb(colour) for colour in ["#ffffff", "#111111", *fills, *words]]
    for pair in pairs:
        a, b = map(ImageColor.getrgb, pair)
        for part in (1, 2, 3):
            mixed = tuple(round(x + (y - x) * part / 4) for x, y in zip(a, b, strict=True))
            # Pillow looks colours up roughly: what is too near to another would be taken for it.
            if all(max(abs(x - y) for x, y in zip(mixed, one, strict=True)) > 12 for one in found):
                found.append(mixed)
    image = Image.new("P", (1, 1))
    image.putpalette([value for colour in found for value in colour])
    return image


def _heading(sheet: Sheet, trace: Trace, rows: int, wide: float, limits: str = "") -> float:
    """The title, and of what this is a picture, from the upper edge on; where they end."""
    y = paragraph(sheet, MARGIN - 14, "How this text came to be", 26, INK, wide)
    of = f"first {rows} of {len(trace.rows):,} prompts" if rows < len(trace.rows) else ""
    drawn = ", ".join(filter(None, (of, limits)))
    said = f"{trace.model}: {words.settings(trace)}" + (f" (drawn: {drawn})" if drawn else "")
    return paragraph(sheet, y - 6, said, 14, SOFT, wide) + 6


def _status(picture: Picture, done: int) -> str:
    """What the pass did that was the last one."""
    if not done:
        masks = picture.row.mode == "diffusion"
        return "Before the first pass" + (": a block of masks" if masks else ": nothing is written")
    number, one = picture.steps[done - 1]
    said = f"Pass {done} of {len(picture.steps)}"
    if not picture.row.blocks:
        return f"{said}: one token"
    block = picture.row.blocks[number]
    if one == len(block.passes):
        return f"{said}: the context tower checks the drafts of block {number + 1}"
    line = picture.tables[number].lines[min(one, len(picture.tables[number].lines) - 2)]
    written, masked = (sum(cell.state == state for cell in line) for state in ("written", "masked"))
    return f"{said}: the denoiser writes {written} of {written + masked} masked positions of block {number + 1}"


def _told(picture: Picture) -> str:
    """What it took."""
    row = picture.row
    said = ", ".join(words.counts(row))
    if row.mode != "ar":
        said += f"; token by token it would be {words.counted(words.alone(row), 'context pass')}"
    return f"{said}."


def _painted(draw: Callable[[Sheet], float], wide: float, high: float) -> Image.Image:
    sheet = Sheet(wide, high)
    draw(sheet)
    return sheet.image


def _saved(image: Image.Image, form: str, **options) -> bytes:
    target = io.BytesIO()
    image.save(target, form, optimize=True, **options)
    return target.getvalue()

"""Drawing on an image, in units of which each is `SCALE` pixels."""

import functools
import math

from PIL import Image, ImageDraw, ImageFont

from twotower_jax.trace.labels import code

SCALE = 2

SIGNS = {
    "␣": (0.62, [[(0.06, -0.06), (0.06, 0.12), (0.54, 0.12), (0.54, -0.06)]]),
    "↵": (0.75, [[(0.62, -0.6), (0.62, -0.22), (0.1, -0.22)], [(0.28, -0.4), (0.1, -0.22), (0.28, -0.04)]]),
    "→": (0.75, [[(0.08, -0.3), (0.66, -0.3)], [(0.48, -0.48), (0.66, -0.3), (0.48, -0.12)]]),
    "⟨": (0.34, [[(0.26, -0.76), (0.08, -0.32), (0.26, 0.12)]]),
    "⟩": (0.34, [[(0.08, -0.76), (0.26, -0.32), (0.08, 0.12)]]),
}
"""Signs that Pillow's font lacks: the width and the lines, in parts of the size, from the baseline."""


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * SCALE)


@functools.cache
def _lacks(character: str) -> bool:
    return bytes(_font(16).getmask(character)) == bytes(_font(16).getmask("\ue000"))  # as one that nothing has


def spelt(text: str) -> str:
    """A text with the code points of characters that Pillow's font lacks."""
    return "".join(code(c) if c not in SIGNS and _lacks(c) else c for c in text)


def width(text: str, size: int) -> float:
    """Of a text that is `spelt`."""
    return sum(SIGNS[c][0] * size if c in SIGNS else _font(size).getlength(c) / SCALE for c in text)


def cut(text: str, size: int, most: float) -> str:
    """A text no wider than `most`; where it is longer, that is seen."""
    if width(text, size) <= most:
        return text
    while text and width(text + "…", size) > most:
        text = text[:-1]
    return text + "…"


def wrapped(text: str, size: int, most: float) -> list[str]:
    """Lines of whole words, none wider than `most`."""
    lines = [""]
    for word in spelt(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and width(longer, size) > most:
            lines.append(cut(word, size, most))
        else:
            lines[-1] = cut(longer, size, most)
    return lines


class Sheet:
    """A white page; what lies beyond its edges is not drawn, so that one of no size serves to measure."""

    def __init__(self, width: float = 0, height: float = 0):
        self.image = Image.new("RGB", (math.ceil(width * SCALE) or 1, math.ceil(height * SCALE) or 1), "white")
        self._draw = ImageDraw.Draw(self.image)

    def box(self, x: float, y: float, w: float, h: float, *, fill=None, edge=None, thick: int = 1, round: int = 4):
        """A rectangle with its left upper corner at x, y."""
        corners = [x * SCALE, y * SCALE, (x + w) * SCALE - 1, (y + h) * SCALE - 1]
        self._draw.rounded_rectangle(corners, round * SCALE, fill, edge, thick * SCALE if edge else 0)

    def dashes(self, x: float, y: float, w: float, h: float, colour: str):
        """A rectangle of dashes."""
        for start, length, across in ((y, w, False), (y + h - 1, w, False), (x, h, True), (x + w - 1, h, True)):
            for at in range(0, math.floor(length), 5):
                end = min(at + 3, length)
                if across:
                    self.box(start, y + at, 1, end - at, fill=colour, round=0)
                else:
                    self.box(x + at, start, end - at, 1, fill=colour, round=0)

    def text(self, x: float, y: float, text: str, size: int, colour: str) -> float:
        """Writes a text that is `spelt` from x on the baseline y; where it ends."""
        for c in text:
            if c in SIGNS:
                advance, lines = SIGNS[c]
                for line in lines:
                    points = [((x + dx * size) * SCALE, (y + dy * size) * SCALE) for dx, dy in line]
                    self._draw.line(points, colour, max(SCALE * size // 12, 2), joint="curve")
                x += advance * size
            else:
                self._draw.text((x * SCALE, y * SCALE), c, colour, _font(size), anchor="ls")
                x += _font(size).getlength(c) / SCALE
        return x

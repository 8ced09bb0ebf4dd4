"""Colours that are told apart by their lightness too, and the ink that is read on them."""

import bisect

SURE = ["#eef8c0", "#c7e9b4", "#93d5b9", "#5fc2c0", "#36a9c3", "#2388bc", "#2264a9", "#243f95", "#132a6b"]
"""From a confidence of 0 to 1, on a light page; on a dark one in the reverse order."""

LATE = ["#fdf0e0", "#fddbb5", "#fcbf85", "#f79d4f", "#e8791f", "#cf6417"]
"""From a block's first pass to its last, on a light page."""

LATE_DARK = ["#33271c", "#573a1f", "#7f4f1f", "#a4611b", "#dd8a35", "#fdb873"]

STEPS = [number / len(SURE) for number in range(1, len(SURE))]


def sure(confidence: float | None) -> int | None:
    """The number of a confidence's colour in `SURE`; None if it is no number."""
    if confidence is None or confidence != confidence:
        return None
    return bisect.bisect_right(STEPS, confidence)


def late(born: int, passes: int) -> int:
    """The number of a pass's colour in `LATE`, if the slowest block took so many passes."""
    return round(born * (len(LATE) - 1) / max(passes - 1, 3))  # a second pass of two is not late yet


def luminance(colour: str) -> float:
    """Of "#rrggbb", as WCAG 2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    """From 1 to 21; WCAG 2 asks for 4.5."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def ink(colour: str) -> str:
    """Black or white, whichever is read better on it."""
    return max(("#111111", "#ffffff"), key=lambda text: contrast(text, colour))

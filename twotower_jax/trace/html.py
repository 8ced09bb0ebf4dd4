"""A trace as one page that needs nothing else: the data, and a script that draws of them what is looked at."""

import json
import math
from html import escape
from importlib.resources import files
from string import Template

from twotower_jax.trace import words
from twotower_jax.trace.colours import LATE, LATE_DARK, SURE, ink, late
from twotower_jax.trace.grid import STATES, Cell, births, grid, outcome, slowest
from twotower_jax.trace.labels import flowing, label
from twotower_jax.trace.record import Block, Row, Trace


def page(trace: Trace) -> str:
    """The page's text."""
    template = Template(files("twotower_jax.trace").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        model=escape(trace.model),
        settings=escape(words.settings(trace)),
        light=_palette(SURE, LATE),
        dark=_palette(SURE[::-1], LATE_DARK),
        classes=_classes(),
        data=_embedded(_data(trace)),
    )


def _palette(sure: list[str], late: list[str]) -> str:
    """CSS variables: colours and the ink on them."""
    named = [(f"c{i}", colour) for i, colour in enumerate(sure)] + [(f"p{i}", colour) for i, colour in enumerate(late)]
    return " ".join(f"--{name}: {colour}; --{name}i: {ink(colour)};" for name, colour in named)


def _classes() -> str:
    names = [f"c{i}" for i in range(len(SURE))] + [f"p{i}" for i in range(len(LATE))]
    return " ".join(f".{name} {{ --fill: var(--{name}); --on: var(--{name}i); }}" for name in names)


def _embedded(data: dict) -> str:
    """JSON that no parser of HTML sees anything in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data(trace: Trace) -> dict:
    return {
        "pieces": {token: [label(piece, token), flowing(piece, token), piece] for token, piece in trace.pieces.items()},
        "rows": [_row(row) for row in trace.rows],
    }


def _row(row: Row) -> dict:
    most = slowest(row)
    denoiser, context = row.forwards
    return {
        "mode": row.mode,
        "about": words.ABOUT[row.mode],
        "counts": words.counts(row),
        "ending": words.ending(row),
        "passes": [denoiser, context, words.alone(row)],
        "prompt": row.prompt,
        "tokens": row.tokens,
        "sure": _thousandths(row.probabilities),
        "born": [[step, -1 if one is None else late(one, most)] for step, one in births(row)],
        "late": [late(one, most) for one in range(most)],
        "blocks": [_block(block) for block in row.blocks],
    }


def _block(block: Block) -> dict:
    lines = [
        _line(line) | {"t": sum(one.masked) / max(len(one.masked), 1)}
        for line, one in zip(grid(block), block.passes, strict=True)
    ]
    return {"start": block.start, "given": block.given, "lines": [*lines, _line(outcome(block))]}


def _line(cells: list[Cell]) -> dict:
    """A letter for each state, ids, thousandths, and passes that wrote (-1: none)."""
    return {
        "s": "".join(STATES[cell.state] for cell in cells),
        "k": [cell.token for cell in cells],
        "c": _thousandths([cell.confidence for cell in cells]),
        "b": [-1 if cell.born is None else cell.born for cell in cells],
    }


def _thousandths(values: list[float | None]) -> list[int]:
    """-1 where there is no number."""
    return [-1 if value is None or not math.isfinite(value) else round(1000 * value) for value in values]

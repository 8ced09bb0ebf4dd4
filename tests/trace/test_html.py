"""The page holds everything, needs nothing, and shows hostile text as text."""

import dataclasses
import json
import math
import time
from html.parser import HTMLParser

import pytest
from traces import HOSTILE, ar_row, block, diffusion_row, long_trace, trace, verified_row

from twotower_jax.trace.colours import LATE, LATE_DARK, SURE, contrast, ink
from twotower_jax.trace.grid import STATES, grid
from twotower_jax.trace.html import page
from twotower_jax.trace.labels import label
from twotower_jax.trace.record import Block, Pass

VOID = {"meta", "input", "link", "br", "img"}


class Parsed(HTMLParser):
    """Tags as they open and close, and the JSON that is in the page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.attributes, self.found, self.kind = [], [], {}, None
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        self.kind = dict(attrs).get("type", tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.found[self.kind] = self.found.get(self.kind, "") + data

    @property
    def data(self):
        return json.loads(self.found["application/json"])


def every_mode():
    blocks = block(0, 1, 0), block(1, 0, start=3, kept=1)
    return trace(diffusion_row(*blocks), verified_row(), ar_row(), ar_row(3, "mock-ar"))


def test_the_page_is_whole_and_loads_nothing():
    text = page(every_mode())
    parsed = Parsed(text)
    assert "http" not in text
    assert not {"src", "href", "srcset"} & {name for name, _ in parsed.attributes}
    assert not any(word in text for word in ("@import", "url(", "fetch(", "import(", "innerHTML", "eval("))


def test_every_token_is_there():
    made = every_mode()
    data = Parsed(page(made)).data
    for row, drawn in zip(made.rows, data["rows"], strict=True):
        assert drawn["prompt"] == row.prompt
        assert drawn["tokens"] == row.tokens
        assert len(drawn["born"]) == len(row.tokens)
        lines = [line for one in drawn["blocks"] for line in one["lines"]]
        used = set(row.prompt + row.tokens).union(*(line["k"] for line in lines))
        assert {str(token) for token in used} <= set(data["pieces"])
        assert all(data["pieces"][str(token)][2] == made.pieces[token] for token in used)


def test_drawn_passes_are_those_of_the_data():
    made = every_mode()
    for row, drawn in zip(made.rows, Parsed(page(made)).data["rows"], strict=True):
        for b, one in zip(row.blocks, drawn["blocks"], strict=True):
            assert len(one["lines"]) == len(b.passes) + 1
            for line, cells, p in zip(one["lines"], grid(b), b.passes, strict=False):
                assert line["s"] == "".join(STATES[cell.state] for cell in cells)
                assert line["c"][-1] == round(1000 * p.confidence[-1]) or line["s"][-1] == "f"
                assert line["t"] == sum(p.masked) / len(p.masked)


def test_hostile_texts_are_text():
    made = trace(diffusion_row(block(*[0] * len(HOSTILE))), pieces=dict(enumerate(HOSTILE, 1)))
    made = dataclasses.replace(made, model="</title><script>alert(1)</script>", settings={"a": "<i>"})
    text = page(made)
    parsed = Parsed(text)
    assert text.count("<script") == 2
    pieces = parsed.data["pieces"]
    assert [pieces[str(i)][2] for i in range(1, len(HOSTILE) + 1)] == HOSTILE


@pytest.mark.parametrize(
    ("piece", "shown"),
    [(" a\n", "␣a↵"), ("\t", "→"), ("", "⟨9⟩"), ("\x1b", "«1b»"), ("\u202e", "«202e»"), ("\u00a0", "«a0»"), ("é", "é")],
)
def test_what_has_no_shape_is_shown(piece, shown):
    assert label(piece, 9) == shown.replace("«", "\u2039").replace("»", "\u203a")


def test_a_confidence_that_is_no_number_is_drawn_as_such():
    odd = Block(0, [Pass([1, 2], [math.nan, 0.25], [True, True])], [1, 2], 0, 2, None)
    assert Parsed(page(trace(diffusion_row(odd)))).data["rows"][0]["blocks"][0]["lines"][0]["c"] == [-1, 250]


@pytest.mark.parametrize("colour", SURE + LATE + LATE_DARK)
def test_text_is_read_on_every_colour(colour):
    assert contrast(colour, ink(colour)) >= 4.5


def test_thousands_of_tokens_are_drawn_in_seconds():
    start = time.perf_counter()
    text = page(long_trace(2000))
    assert time.perf_counter() - start < 5
    assert len(text) < 2e6

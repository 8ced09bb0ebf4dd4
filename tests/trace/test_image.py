"""Pictures and films show what was recorded."""

import io
import time

import pytest
from PIL import Image
from traces import HOSTILE, ar_row, block, confidence, diffusion_row, long_trace, trace, verified_row

from twotower_jax.trace.cells import CELL, GAP, MARGIN
from twotower_jax.trace.colours import SURE, sure
from twotower_jax.trace.image import gif, png
from twotower_jax.trace.layout import SIDE, Picture
from twotower_jax.trace.sheet import SCALE, spelt, width


def opened(data):
    return Image.open(io.BytesIO(data))


def colours(image):
    return {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in image.convert("RGB").getcolors(1 << 20)}


def test_a_film_has_a_frame_for_each_pass_and_two_more():
    film = opened(gif(trace(diffusion_row(block(0, 1, 0), block(1, 0, 2, start=3)))))
    assert film.n_frames == 5 + 2
    times = []
    for frame in range(film.n_frames):
        film.seek(frame)
        times.append(film.info["duration"])
    assert max(times[:-1]) < times[-1]


@pytest.mark.parametrize(("row", "frames"), [(verified_row(), 6 + 5 + 2), (ar_row(5), 5 + 2), (ar_row(0), 2)])
def test_a_film_of_every_mode(row, frames):
    assert opened(gif(trace(row))).n_frames >= frames - (row.tokens == [])  # frames that are alike are one


def test_written_cells_have_their_confidences_colours():
    commits = [0, 0, 0, 1, 1]
    row = diffusion_row(block(*commits))
    image = opened(png(trace(row))).convert("RGB")
    table = Picture(trace(row), row).tables[0]
    found = {}
    left = MARGIN + SIDE
    for place, w in enumerate(table.widths):
        x = (left + w - 3) * SCALE  # the cell's right edge, where no letter is
        column = [image.getpixel((int(x), y)) for y in range(image.height)]
        found[place] = {"#{:02x}{:02x}{:02x}".format(*pixel) for pixel in column}
        left += w + GAP
    for place, number in enumerate(commits):
        assert SURE[sure(confidence(number, place))] in found[place]


def test_a_film_has_the_colours_of_the_picture():
    row = diffusion_row(block(*range(5), *range(5)))
    film = opened(gif(trace(row)))
    film.seek(film.n_frames - 1)
    wanted = {SURE[sure(confidence(number % 5, number))] for number in range(10)} | {"#ffffff"}
    assert wanted <= colours(film)


def test_a_picture_grows_with_its_passes():
    def height(passes):
        return opened(png(trace(diffusion_row(block(*range(passes)))))).height

    assert height(5) - height(4) == (CELL + GAP) * SCALE


def test_what_is_left_out_is_said():
    row = long_trace(2000).rows[0]
    picture = Picture(long_trace(2000), row)
    shown = len(picture.tables)
    assert 1 <= shown < 9
    assert picture.left_out == f"first {shown} of 125 blocks"
    wide = diffusion_row(block(*range(40)))
    assert Picture(trace(wide), wide).left_out == "first 32 of 40 positions, first 32 of 40 passes"
    many = ar_row(200)
    assert Picture(trace(many), many).left_out == "first 128 of 200 tokens"


def test_a_long_trace_is_drawn_in_seconds():
    start = time.perf_counter()
    made = long_trace(2000)
    assert len(png(made)) + len(gif(made)) < 5e6
    assert time.perf_counter() - start < 20


def test_hostile_texts_are_drawn():
    made = trace(diffusion_row(block(*[0] * len(HOSTILE))), pieces=dict(enumerate(HOSTILE, 1)))
    opened(png(made)).load()
    opened(gif(made)).load()


def test_characters_that_the_font_lacks_are_spelt():
    assert spelt("aé␣ש") == "a\u2039e9\u203a␣\u20395e9\u203a"
    assert width(spelt("é"), 15) > width("e", 15)


def test_an_empty_trace_is_a_picture():
    assert opened(png(trace())).width > 0
    assert opened(gif(trace(ar_row(0)))).n_frames == 2

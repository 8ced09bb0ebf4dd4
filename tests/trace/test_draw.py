"""A drawing appears whole, under a name that says what it is; anything else is refused in a line."""

import os

import pytest
from traces import block, diffusion_row, trace

import twotower_jax as tt
from twotower_jax.trace import check, draw, image

MADE = trace(diffusion_row(block(0, 1)))


@pytest.mark.parametrize(("suffix", "begins"), [(".html", b"<!DOCTYPE"), (".gif", b"GIF89a"), (".PNG", b"\x89PNG")])
def test_the_suffix_says_what_is_drawn(tmp_path, suffix, begins):
    file = tmp_path / f"a{suffix}"
    file.write_text("old")
    draw(MADE, file)
    assert file.read_bytes().startswith(begins)
    assert os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize(
    "name", ["a", "a.jpg", "none/a.png", "folder.png", "file/a.gif", "pipe.html", "nul\0.png", "a" * 300 + ".png"]
)
def test_what_cannot_be_is_refused_in_a_line(tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.html")
    before = sorted(os.listdir(tmp_path))
    for act in (check, lambda path: draw(MADE, path)):
        with pytest.raises(tt.InputError) as error:
            act(tmp_path / name)
        assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "file")
    draw(MADE, tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "file").read_bytes().startswith(b"\x89PNG")


def test_a_drawing_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    file.write_text("old")
    monkeypatch.setattr(image, "png", lambda trace: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw(MADE, file)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.png"]

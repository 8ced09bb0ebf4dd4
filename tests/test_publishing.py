"""A folder is whole or absent, and what killed processes left is cleared away without touching what others make."""

import contextlib
import os
import threading
import time
from pathlib import Path

import pytest

import twotower_jax as tt
from twotower_jax import publishing
from twotower_jax.publishing import LOCK, SUFFIX, absent, published


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def abandon(target):
    """As a process that was killed leaves it: its lock is gone, its folder is not."""
    folder = target.with_name(f".{target.name}.0123abcd{SUFFIX}")
    folder.mkdir()
    (folder / LOCK).touch()
    (folder / "part").write_text("x")
    return folder


def fail(target, work):
    """Makes a folder, does some work in it, and then an error comes."""

    def make():
        with published(target) as folder:
            work(folder)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make()


def test_whole(tmp_path):
    with published(tmp_path / "deep" / "made") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "deep" / "made").exists()
    assert names(tmp_path / "deep") == ["made"]
    assert names(tmp_path / "deep" / "made") == ["file"]


def test_nothing_after_an_error(tmp_path):
    fail(tmp_path / "made", lambda folder: (folder / "file").write_text("x"))
    assert names(tmp_path) == []


def test_no_parents_after_an_error(tmp_path):
    (tmp_path / "there").mkdir()
    fail(tmp_path / "there" / "new" / "deep" / "made", lambda folder: None)
    assert names(tmp_path) == ["there"]
    assert names(tmp_path / "there") == []


def test_nothing_though_a_thread_writes_on(tmp_path):
    """A library's thread that makes its folder again for a while, after the error that ended its work."""
    stop = time.monotonic() + 1

    def write(folder):
        while time.monotonic() < stop:
            with contextlib.suppress(OSError):  # removed while it was made
                os.makedirs(folder / "state", exist_ok=True)
            time.sleep(0.02)

    fail(tmp_path / "made", lambda folder: threading.Thread(target=write, args=(folder,)).start())
    assert time.monotonic() > stop
    assert names(tmp_path) == []


def test_abandoned_folders_are_removed(tmp_path):
    left = abandon(tmp_path / "made")
    with published(tmp_path / "made") as folder:
        assert not left.exists()
        with published(tmp_path / "made2") as other:  # another's, in the making
            assert folder.exists()
            assert other.exists()
    assert names(tmp_path) == ["made", "made2"]


def test_two_at_once(tmp_path):
    """The first to finish has the name; the other is told, and leaves nothing."""

    def make(name, within):
        with published(tmp_path / "made") as folder:
            (folder / name).write_text("x")
            within()
            assert folder.exists()

    with pytest.raises(tt.InputError, match="appeared meanwhile"):
        make("mine", lambda: make("theirs", lambda: None))
    assert names(tmp_path) == ["made"]
    assert names(tmp_path / "made") == ["theirs"]


def test_long_names(tmp_path):
    name = "é" * 127  # 254 bytes
    with published(absent(tmp_path / name)):
        pass
    assert names(tmp_path) == [name]
    with pytest.raises(tt.InputError, match="cannot be made: File name too long"):
        absent(tmp_path / ("x" * 300))


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for path, message in {
        "file": "file exists; give a folder that does not",
        "dangling": "dangling exists",
        "file/x": "x cannot be made: .*file is a file",
        "file/x/y": "y cannot be made: .*file is a file",
        ".": "exists",
        "..": "exists",
        "file/..": "cannot be made|exists",
        "loop/x": "cannot be made: Symlink loop",
    }.items():
        with pytest.raises(tt.InputError, match=message):
            absent(tmp_path / path)
    assert absent(tmp_path / "nope" / ".." / "y") == tmp_path / "y"
    assert names(tmp_path) == ["dangling", "file", "loop"]


def test_a_text_is_replaced_whole(tmp_path, monkeypatch):
    """Through a link; and where it cannot be written what was there stays, and nothing else."""
    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    publishing.replace_text(link, "one")
    assert (file.read_text(), link.is_symlink()) == ("one", True)
    monkeypatch.setattr(Path, "write_text", lambda path, text: (path.touch(), Path("/nothing/here").touch()))
    with pytest.raises(OSError, match="/nothing/here"):
        publishing.replace_text(file, "two")
    assert file.read_text() == "one"
    assert set(tmp_path.iterdir()) == {file, link}


def test_what_is_no_file_is_written_to():
    publishing.replace_text(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()

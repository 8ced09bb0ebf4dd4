"""A folder, or a file, that appears under its name when it is whole, and not before."""

import contextlib
import fcntl
import glob
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from twotower_jax.errors import InputError

LOCK = ".lock"
SUFFIX = ".incomplete"


def absent(target: Path) -> Path:
    """The path of a folder to be made, without links or `..` before its name.

    Raises:
      InputError: something is there, or nothing can be.
    """
    try:
        if target.name in ("", ".."):
            target = target.resolve()
        target = target.parent.resolve() / target.name
    except (OSError, RuntimeError) as error:  # a loop of links
        raise InputError(f"{target} cannot be made: {error}") from None
    for folder in target.parents:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{target} cannot be made: {folder} is a file")
    try:
        target.lstat()
    except FileNotFoundError:
        return target
    except OSError as error:
        raise InputError(f"{target} cannot be made: {error.strerror}") from None
    raise InputError(f"{target} exists; give a folder that does not")


@contextlib.contextmanager
def published(target: Path, replace: bool = False) -> Iterator[Path]:
    """Gives an empty folder beside `target`, renamed to it at the end or, after an error, removed.

    `target` is absent, or, to `replace` it, a folder that stays until the new one is whole.

    What processes left behind when they were killed is removed first; a lock tells which folders are in use.

    Raises:
      InputError: `target` cannot be made.
    """
    prefix = f".{target.name[:40]}."  # a name may be as long as the file system allows
    folder = target.with_name(f"{prefix}{secrets.token_hex(4)}{SUFFIX}")
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target.parent, prefix)
        folder.mkdir()
    except OSError as error:
        raise InputError(f"{target} cannot be made: {error.strerror}") from None
    try:
        with open(folder / LOCK, "w") as handle:
            with contextlib.suppress(OSError):  # a file system without locks: then nothing is ever abandoned either
                lock(handle)
            yield folder
            (folder / LOCK).unlink()
            if replace and target.exists():
                (target / LOCK).touch()  # so that it is known as abandoned if it is not removed below
                old = target.rename(folder.with_name(f"{prefix}{secrets.token_hex(4)}{SUFFIX}"))
                _rename(folder, target)
                shutil.rmtree(old)
            else:
                _rename(folder, target)
    except BaseException:
        _remove(folder)
        for parent in missing:
            with contextlib.suppress(OSError):  # not empty: another's
                parent.rmdir()
        raise


def replace_text(target: Path, text: str) -> None:
    """Writes a file that is, whenever it is looked at or the process ends, what it was or all of the text.

    Raises:
      OSError: it cannot be written.
    """
    target = target.resolve()
    if target.exists() and not target.is_file():  # a terminal, a pipe
        target.write_text(text)
        return
    unfinished = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}{SUFFIX}")
    try:
        unfinished.write_text(text)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)


def lock(file: IO[str]) -> None:
    """Raises `OSError` if another process holds the lock; it ends with the process that does."""
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    for folder in parent.glob(f"{glob.escape(prefix)}*{SUFFIX}"):
        with contextlib.suppress(OSError), open(folder / LOCK, "r+") as handle:
            lock(handle)
            shutil.rmtree(folder)


def _rename(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError as error:
        raise InputError(f"{target} appeared meanwhile, so this conversion was dropped: {error.strerror}") from None


def _remove(folder: Path) -> None:
    """Removes a folder for good: a library's threads may write to it for a moment after the error that ended them."""
    absent = 0
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)
        absent = 0 if folder.exists() else absent + 1
        if absent == 3:
            return

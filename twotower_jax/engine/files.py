"""Files of lines, read as often as wanted, and files of results, which hold whole lines alone."""

import bz2
import contextlib
import fcntl
import gzip
import json
import lzma
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from twotower_jax import distributed
from twotower_jax.engine.lines import done_lines, raw_lines
from twotower_jax.errors import InputError

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
STANDARD = "-"
Lines = Callable[[], Iterator[tuple[int, bytes, int]]]  # each line's number, bytes and checksum


@contextlib.contextmanager
def opened(source: str) -> Iterator[Lines]:
    """What reads the lines of a file from the beginning, each time that it is called."""
    with contextlib.ExitStack() as stack:
        if source == STANDARD:
            path = Path(stack.enter_context(tempfile.NamedTemporaryFile(suffix=".jsonl")).name)
            with open(path, "wb") as kept:
                shutil.copyfileobj(sys.stdin.buffer, kept)
        else:
            path = Path(source)

        def lines() -> Iterator[tuple[int, bytes, int]]:
            try:
                if path.suffix == ".parquet":
                    yield from _of_parquet(path)
                    return
                with _open(path) as file:
                    yield from raw_lines(file)
            except (OSError, EOFError, lzma.LZMAError) as error:
                raise InputError(f"cannot read {source}: {getattr(error, 'strerror', None) or error}") from None

        with contextlib.closing(lines()) as first:  # that it can be read is known before anything else is done
            next(first, None)
        yield lines


def _open(path: Path) -> BinaryIO:
    return OPENERS.get(path.suffix, open)(path, "rb")


def _of_parquet(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """Each row as a line of JSON, without what is null."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise InputError(f'{path} needs pyarrow: pip install "twotower_jax[ray]"') from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    raw = json.dumps(_without_nulls(row), ensure_ascii=False, default=str).encode(errors="replace")
                    yield number, raw, zlib.crc32(raw)
    except pa.ArrowException as error:
        raise InputError(f"cannot read {path}: {str(error).splitlines()[0]}") from None


def _without_nulls(value: Any) -> Any:
    """Columns hold null where a row has no such key."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def inputs_below(folder: Path) -> list[tuple[Path, str]]:
    """The files of requests in a folder and those below it, and their names from there."""
    kinds = (*(f".jsonl{end}" for end in ("", *OPENERS)), ".parquet")
    found = sorted(file for file in folder.rglob("*") if file.is_file() and file.name.endswith(kinds))
    return [(file, file.relative_to(folder).as_posix()) for file in found]


class Results:
    """The file of results: whole lines alone, whatever happens."""

    def __init__(self, target: str):
        self._target = target
        self._done: dict[int, str] = {}

    def __enter__(self) -> "Results":
        """In a job of several processes the first one writes; all know what is answered."""
        if self._target == STANDARD:
            if distributed.joined():
                raise InputError("a job of several processes writes a file: give OUT a name")
            self._file = sys.stdout.fileno()
            return self
        self._file = None
        for turn in (True, False):
            with distributed.checked_together():
                if turn == distributed.first():
                    self._open(writes=turn)
        return self

    def _open(self, writes: bool) -> None:
        path = Path(self._target)
        if path.exists() and not path.is_file():
            raise InputError(f"cannot write {self._target or 'to an empty name'}: it is no file")
        self._made = writes and not path.exists()
        try:
            if writes:
                self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._done = done_lines(path)
        except BlockingIOError:
            raise InputError(f"{self._target} is being written by another job; wait for it, or stop it") from None
        except OSError as error:
            raise InputError(f"cannot write {self._target}: {error.strerror}") from None

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if self._target != STANDARD and self._file is not None:
            if kind is not None and self._made and os.fstat(self._file).st_size == 0:
                os.unlink(self._target)  # nothing was done
            os.close(self._file)

    def has(self, number: int, checksum: int) -> bool:
        """Whether a line is answered.

        Raises:
          InputError: another line of this number is.
        """
        if number in self._done and self._done[number] != f"{checksum:08x}":
            raise InputError(
                f"{self._target} has the answer to another line {number}, or by another model, or with other options; "
                "give the same again, or another file"
            )
        return number in self._done

    def write(self, line: bytes) -> None:
        if not distributed.first():
            return
        standard = self._target == STANDARD
        end = 0 if standard else os.lseek(self._file, 0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
        except BrokenPipeError:
            raise
        except OSError as error:
            if not standard:
                os.ftruncate(self._file, end)
            goes_on = "" if standard else "; what is written stays, and the same command goes on"
            raise InputError(f"cannot write {self._target}: {error.strerror}{goes_on}") from None

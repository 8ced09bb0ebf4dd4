"""Our own checkpoint folder: the parameters in Orbax under `params/`; `checkpoint.json`, which says what that holds;
`config.json` and the tokenizer's files.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from orbax.checkpoint.experimental import v1 as ocp

from twotower_jax import interrupts, two_tower
from twotower_jax.config import Config, parse_config, read_json
from twotower_jax.errors import InputError
from twotower_jax.parameters import Parameter, Part, cut, flatten, unflatten, whole

PARAMS = "params"
CONTENTS = "checkpoint.json"
FORMAT = 3  # of both; 1 was without slices of large matrices, 2 with experts' `up` as (E, D, F)
GROUP_BYTES = 2**25  # small parameters are written and read together, up to this much
PIECE_BYTES = 2**20  # of an array have a checksum of their own, about, so that a part can be read alone
CHUNK_BYTES = 2**23  # of an array lie together at most
ODD_DTYPES = ("bfloat16", "float16", "float32")


def is_converted(folder: Path) -> bool:
    """Whether a folder is of our format, whole or not."""
    return (folder / CONTENTS).is_file() or ((folder / PARAMS).is_dir() and not any(folder.glob("*.safetensors")))


class ConvertedFolder:
    """A checked checkpoint folder, read parameter by parameter.

    Attributes:
      raw_config: `config.json` as it stands.
      config: the same, checked.
      two_towers: whether it holds both towers.
      odd_dtypes: Hugging Face tensors that had another dtype than the parameter they are part of, by name.

    Raises:
      InputError: with a line for everything that is wrong.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.raw_config: dict[str, Any] = read_json(folder / "config.json")
        self.config: Config = parse_config(self.raw_config)
        contents = _checked_contents(folder)
        self.two_towers: bool = contents["two_towers"]
        self.odd_dtypes: dict[str, str] = contents["odd_dtypes"]
        self._checksums: dict[str, list[int]] = contents["checksums"]
        self._path = (folder / PARAMS).absolute()
        with _orbax(f"{self._path} is damaged; convert it again"):
            stored = ocp.metadata(self._path).metadata
            if stored is None:
                raise ValueError("Orbax finds no parameters")
            self._stored = dict(flatten(stored))
        expected = dict(flatten(two_tower.describe(self.config, self.two_towers)))
        shapes = {path: self.config.shape(p.axes) for path, p in expected.items()}
        problems = [f"{folder}: missing parameter {'/'.join(path)}" for path in shapes if path not in self._stored]
        problems += [f"{folder}: unexpected parameter {'/'.join(path)}" for path in self._stored if path not in shapes]
        problems += [
            f"{folder}: parameter {'/'.join(path)} has shape {tuple(leaf.shape)}, config.json asks for {shapes[path]}"
            for path, leaf in self._stored.items()
            if path in shapes and tuple(leaf.shape) != shapes[path]
        ]
        if problems:
            raise InputError("\n".join(problems))
        self._order = list(shapes)
        self._parameters = expected
        self._ahead: dict[tuple[str, ...], np.ndarray] = {}
        self._last: tuple[Any, np.ndarray] | None = None  # what was read last, if another part of it may be wanted

    def dtype(self, path: tuple[str, ...]) -> np.dtype:
        """The dtype that a parameter is stored in."""
        return np.dtype(self._stored[path].dtype)

    def read(self, path: tuple[str, ...], part: Part | None = None) -> np.ndarray:
        """One parameter, or a part of it: of large ones no more is read than the pieces that the part touches, and for
        parts in a row that touch the same ones, once.

        Quick in the description's order: small ones that follow are read along.
        """
        pieces = self._pieces(path)
        if pieces.count > 1:
            part = part or whole(self._stored[path].shape)
            found = [
                self._large(path, (*part[: pieces.axis], (r,), *part[pieces.axis + 1 :])) for r in part[pieces.axis]
            ]
            return found[0] if len(found) == 1 else np.concatenate(found, pieces.axis)
        if part is None:
            return self._small(path)
        return cut(self._once(path, lambda: self._small(path)), part)

    def _once(self, key: Any, read: Callable[[], np.ndarray]) -> np.ndarray:
        """What was read last, if the key is the same."""
        if self._last is None or self._last[0] != key:
            self._last = None  # before the next one comes
            self._last = (key, read())
        return self._last[1]

    def _pieces(self, path: tuple[str, ...]) -> "Pieces":
        return Pieces.of(self._parameters[path], self._stored[path].shape, self.dtype(path))

    def _large(self, path: tuple[str, ...], part: Part) -> np.ndarray:
        """A part with a single range of the axis of pieces."""
        pieces, shape = self._pieces(path), self._stored[path].shape
        (wanted,) = part[pieces.axis]
        first, last = wanted.start // pieces.length, -(-wanted.stop // pieces.length)
        inner = slice(wanted.start - first * pieces.length, wanted.stop - first * pieces.length)
        inside = (*part[: pieces.axis], (inner,), *part[pieces.axis + 1 :])
        if all(r == s for i, (r, s) in enumerate(zip(part, whole(shape), strict=True)) if i != pieces.axis):
            return cut(self._checked(path, first, last), inside)
        return cut(self._once((path, first, last), lambda: self._checked(path, first, last)), inside)

    def _checked(self, path: tuple[str, ...], first: int, last: int) -> np.ndarray:
        """The pieces from `first` to before `last` of an array."""
        name, pieces = "/".join(path), self._pieces(path)
        home = {"driver": "file", "path": f"{self._path}/state/"}
        store = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": home, "path": ".".join(path) + "/"}}
        touched = slice(first * pieces.length, min(last * pieces.length, pieces.size))
        with _orbax(f"cannot read {name} of {self._path}; convert it again"):
            array = tensorstore.open(store, read=True).result()
            value = array[pieces.index(touched)].read().result()
        if pieces.checksums(value) != self._checksums.get(name, [])[first:last]:
            raise self._damaged(name)
        return value

    def _damaged(self, name: str) -> InputError:
        return InputError(f"{name} of {self._path} is damaged: its checksum differs; convert it again")

    def _small(self, path: tuple[str, ...]) -> np.ndarray:
        if path not in self._ahead:
            wanted: dict[tuple[str, ...], Any] = dict.fromkeys(self._stored, ocp.PLACEHOLDER)
            group = self._group(path)
            wanted |= {p: np.empty(self._stored[p].shape, self.dtype(p)) for p in group}
            with _orbax(f"cannot read {'/'.join(path)} of {self._path}; convert it again"):
                loaded = dict(flatten(ocp.load(self._path, unflatten(wanted))))
            self._ahead = {p: loaded[p] for p in group}
        value = self._ahead.pop(path)
        if self._pieces(path).checksums(value) != self._checksums.get("/".join(path)):
            raise self._damaged("/".join(path))
        return value

    def _group(self, first: tuple[str, ...]) -> list[tuple[str, ...]]:
        group, size = [], 0
        for path in self._order[self._order.index(first) :]:
            size += math.prod(self._stored[path].shape) * self.dtype(path).itemsize
            if group and size > GROUP_BYTES:
                break
            if self._pieces(path).count == 1:
                group.append(path)
        return group


class Writer:
    """Writes parameters one after the other; nothing under `folder` loads before `finish`.

    In a job of several processes all call it alike, for Orbax has them wait for each other; the first one writes.
    """

    def __init__(self, folder: Path, two_towers: bool, odd_dtypes: dict[str, str]):
        self._folder, self._path = folder, (folder / PARAMS).absolute()
        self._contents = {"format": FORMAT, "two_towers": two_towers, "odd_dtypes": odd_dtypes}
        self._checksums: dict[str, list[int]] = {}
        self._group: dict[tuple[str, ...], np.ndarray] = {}

    def add(self, path: tuple[str, ...], p: Parameter, value: np.ndarray) -> None:
        pieces = Pieces.of(p, value.shape, value.dtype)
        self._checksums["/".join(path)] = pieces.checksums(value)
        alone = p.stacked and pieces.count > 1
        if alone or sum(v.nbytes for v in self._group.values()) + value.nbytes > GROUP_BYTES:
            self._flush()
        self._group[path] = value
        if alone:
            self._flush(by_slices=True)

    def _flush(self, by_slices: bool = False) -> None:
        if self._group:
            in_chunks = ocp.Context()
            in_chunks.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
            in_chunks.array.saving.storage_options.shard_axes = (0,) if by_slices else ()
            with _orbax(f"cannot write {self._path}"), in_chunks:
                ocp.partial.save(self._path, unflatten(self._group))
            self._group = {}

    def finish(self) -> None:
        self._flush()
        with _orbax(f"cannot write {self._path}"):
            ocp.partial.finalize(self._path)
        if jax.process_index() != 0:
            return
        contents = self._contents | {"files": dict(sorted(_sizes(self._path).items())), "checksums": self._checksums}
        (self._folder / CONTENTS).write_text(json.dumps(contents) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What of an array is checked, and so read, together: ranges of `length` of one axis, which has `size`."""

    axis: int
    length: int
    size: int

    @classmethod
    def of(cls, p: Parameter, shape: tuple[int, ...], dtype: np.dtype) -> "Pieces":
        """Slices of stacked arrays; of others of more than `PIECE_BYTES` ranges of an axis that devices may divide."""
        size = math.prod(shape) * dtype.itemsize
        if size <= PIECE_BYTES or p.stacked:
            return cls(0, 1 if size > PIECE_BYTES else max(shape[0], 1), shape[0])
        axis = max(range(len(shape)), key=lambda i: (p.axes[i] != "hidden", shape[i]))
        return cls(axis, math.ceil(shape[axis] * PIECE_BYTES / size), shape[axis])

    @property
    def count(self) -> int:
        return math.ceil(self.size / self.length)

    def index(self, of_axis: slice) -> tuple[slice, ...]:
        """An array's index that takes a range of the axis."""
        return (*[slice(None)] * self.axis, of_axis)

    def checksums(self, value: np.ndarray) -> list[int]:
        """The CRC-32 of every piece's bytes, of the array or of a range that begins with a piece."""

        def one(start: int) -> int:
            piece = np.ascontiguousarray(value[self.index(slice(start, start + self.length))])
            return zlib.crc32(piece.reshape(-1).view(np.uint8))

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(one, range(0, value.shape[self.axis], self.length)))


def _sizes(params: Path) -> dict[str, int]:
    """Every file below a folder, and its size in bytes."""
    return {file.relative_to(params).as_posix(): file.stat().st_size for file in params.rglob("*") if file.is_file()}


def _checked_contents(folder: Path) -> dict[str, Any]:
    """`checkpoint.json`, if every file that it names is there and whole: Orbax would say it less clearly."""
    if not (folder / CONTENTS).is_file():
        raise InputError(f"{folder} has {PARAMS}/ but no {CONTENTS}, so it is no checkpoint that convert finished")
    contents = read_json(folder / CONTENTS)
    if isinstance(contents, dict) and "checksums" in contents and contents.get("format") != FORMAT:
        raise InputError(
            f"{folder} was written by another version of twotower_jax (format {contents.get('format', 1)!r}, "
            f"this one reads {FORMAT}); convert its source again"
        )
    kinds = {"two_towers": bool, "odd_dtypes": dict, "files": dict, "checksums": dict}
    right = isinstance(contents, dict) and all(isinstance(contents.get(name), kinds[name]) for name in kinds)
    right = right and all(isinstance(found, list) for found in contents["checksums"].values())
    if not right or any(dtype not in ODD_DTYPES for dtype in contents["odd_dtypes"].values()):
        raise InputError(f"{folder / CONTENTS} must hold {', '.join(kinds)}, as convert writes it; convert again")
    found = _sizes(folder / PARAMS)
    problems = [
        f"{folder / PARAMS / name} is damaged: it has {found[name]} bytes, not {size}; convert it again"
        if name in found
        else f"{folder / PARAMS / name} is missing; convert it again"
        for name, size in contents["files"].items()
        if found.get(name) != size
    ]
    if problems:
        raise InputError("\n".join(problems))
    return contents


# When Orbax gives up, drivers that are still at work find its event loop closed, and tasks that nobody waits for any
# more have errors of their own; both are told at length, at any later time. What went wrong first is in our line.
def _report(unraisable: Any, report=sys.unraisablehook) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        report(unraisable)


sys.unraisablehook = _report
logging.getLogger("asyncio").addFilter(
    lambda record: not any(word in record.getMessage() for word in ("orbax", "zarr3", "OCDBT"))
)


@contextlib.contextmanager
def _orbax(failed: str) -> Iterator[None]:
    """Orbax at work: whole or not at all under Ctrl-C, its errors (of many storage drivers) one line of ours."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with interrupts.deferred():
            yield
    except Exception as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{failed}: {first}") from None
    finally:
        logger.setLevel(level)


class TrainingCheckpoints:
    """The checkpoints of a run, written in the background; the newest `keep` stay, and half-written ones never load."""

    def __init__(self, folder: Path, keep: int, reads_only: bool = False):
        policies = ocp.training
        self._folder = folder
        with _orbax(f"cannot {'read' if reads_only else 'write'} {folder}"):
            self._checkpointer = ocp.training.Checkpointer(
                folder.absolute(),
                save_decision_policy=policies.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=policies.preservation_policies.LatestN(keep),
                cleanup_tmp_directories=not reads_only,  # which may be another process's work,
            )

    @property
    def steps(self) -> list[int]:
        """The steps of all whole checkpoints."""
        return [found.step for found in self._checkpointer.checkpoints]

    @property
    def latest(self) -> int | None:
        """The newest whole checkpoint's step."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, step: int, state: Any, extra: dict[str, Any]) -> None:
        """Begins to write; returns as soon as the arrays are copied."""
        with _orbax(f"cannot write {self._folder}"):
            self._checkpointer.save_async(step, state, custom_metadata=extra)

    def extra(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays of a step."""
        with _orbax(self._unreadable(step)):
            return self._checkpointer.metadata(step).custom_metadata

    def load(self, step: int, like: Any) -> Any:
        """The arrays of a step, in the shapes, dtypes and shardings of `like`."""
        with _orbax(self._unreadable(step)):
            return self._checkpointer.load(step, like)

    def _unreadable(self, step: int) -> str:
        return f"{self._folder / str(step)} cannot be read; if it is damaged, remove it to go on from the one before"

    def close(self) -> None:
        """Waits until everything is written."""
        with _orbax(f"cannot write {self._folder}"):
            self._checkpointer.close()

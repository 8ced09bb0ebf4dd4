"""Reading a folder of safetensors, checked against the parameter description before a byte of data is used."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from convert import layouts
from twotower_jax import two_tower
from twotower_jax.config import Config, parse_config, read_json
from twotower_jax.errors import InputError
from twotower_jax.parameters import Parameter, Part, cut, flatten, whole

INDEX = "model.safetensors.index.json"
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor is, and what its file's header says of it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class HuggingFaceFolder:
    """A checked folder in NVIDIA's TwoTower layout or a NemotronH backbone's.

    Attributes:
      raw_config: `config.json` as it stands.
      config: the same, checked.
      two_towers: whether it holds both towers.

    Raises:
      InputError: with a line for everything that is wrong.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.raw_config: dict[str, Any] = read_json(folder / "config.json")
        self.config: Config = parse_config(self.raw_config)
        if self.config.expert_form:
            raise InputError(f"{folder} says that its experts are {self.config.expert_form}, but no convert wrote it")
        self._tensors, problems, explained = _scan(folder)
        self.two_towers = any(name.startswith(("context_tower.", "denoiser_tower.")) for name in self._tensors)
        self._parameters = dict(flatten(two_tower.describe(self.config, self.two_towers)))
        if self._tensors or not problems:
            problems += self._mismatches(explained)
        if problems:
            raise InputError("\n".join(problems))

    def _mismatches(self, explained: set[str]) -> list[str]:
        """What the headers have against the description; of `explained` tensors it is known why they are missing."""
        expected: dict[str, tuple[int, ...]] = {}
        for p in self._parameters.values():
            expected |= layouts.tensors(p, self.config.shape(p.axes))
        absent = [name for name in expected if name not in self._tensors and name not in explained]
        problems = [f"missing tensor {name} {expected[name]}" for name in absent]
        for name, tensor in self._tensors.items():
            if name not in expected:
                problems.append(f"unexpected tensor {name} {tensor.shape} in {tensor.file.name}")
            elif tensor.shape != expected[name]:
                problems.append(
                    f"tensor {name} in {tensor.file.name} has shape {tensor.shape}, "
                    f"config.json asks for {expected[name]}"
                )
            elif tensor.dtype not in DTYPES:
                problems.append(f"tensor {name} in {tensor.file.name} is {tensor.dtype}; known are {', '.join(DTYPES)}")
        return problems

    def _of(self, path: tuple[str, ...]) -> tuple[Parameter, list[str]]:
        p = self._parameters[path]
        return p, list(layouts.tensors(p, self.config.shape(p.axes)))

    def dtype(self, path: tuple[str, ...]) -> np.dtype:
        """The dtype that holds every tensor of a parameter without loss."""
        dtypes = {DTYPES[self._tensors[name].dtype] for name in self._of(path)[1]}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    @functools.cached_property
    def odd_dtypes(self) -> dict[str, str]:
        """Tensors whose dtype is not their parameter's, by name: what a way back must know."""
        return {
            name: DTYPES[self._tensors[name].dtype].name
            for path in self._parameters
            for name in self._of(path)[1]
            if DTYPES[self._tensors[name].dtype] != self.dtype(path)
        }

    def read(self, path: tuple[str, ...], part: Part | None = None) -> np.ndarray:
        """One parameter in our layout, stacked over experts or layers, or a part of it. Holds no file open."""
        p, names = self._of(path)
        part = part or whole(self.config.shape(p.axes))
        out = np.empty([sum(r.stop - r.start for r in ranges) for ranges in part], self.dtype(path))
        slices = out if p.stacked else out[None]
        if p.stacked:
            names = [name for r in part[0] for name in names[r]]
        there = layouts.part_there(p, part[1:] if p.stacked else part)
        by_file: dict[Path, list[int]] = {}
        for i, name in enumerate(names):
            by_file.setdefault(self._tensors[name].file, []).append(i)
        for file, indices in by_file.items():
            with safe_open(file, "np") as handle:
                for i in indices:
                    tensor = layouts.to_ours(p, cut(handle.get_slice(names[i]), there))
                    with np.errstate(invalid="ignore"):
                        slices[i] = tensor
                        kept = tensor.dtype == out.dtype or _bits(slices[i].astype(tensor.dtype)) == _bits(tensor)
                    if not kept:
                        raise InputError(
                            f"{names[i]} holds a NaN that {out.dtype}, the dtype of all of {'/'.join(path)}, "
                            "cannot keep bit for bit"
                        )
        return out


def _bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def _scan(folder: Path) -> tuple[dict[str, Tensor], list[str], set[str]]:
    """Every tensor of a folder from its files' headers, what is wrong with the files, and the tensors lost by that."""
    if (folder / INDEX).is_file():
        return _scan_index(folder)
    if (folder / "model.safetensors").is_file():
        return *_scan_file(folder / "model.safetensors"), set()
    if list(folder.glob("*.bin")):
        return {}, [f"{folder} holds pickled weights (*.bin) only; save them as safetensors"], set()
    return {}, [f"{folder} holds no weights: neither {INDEX}, model.safetensors nor a converted checkpoint"], set()


def _scan_file(file: Path) -> tuple[dict[str, Tensor], list[str]]:
    try:
        with safe_open(file, "np") as handle:
            headers = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
            return {n: Tensor(file, h.get_dtype(), tuple(h.get_shape())) for n, h in headers.items()}, []
    except (SafetensorError, OSError) as error:
        return {}, [f"{file.name} is truncated or no safetensors file: {error}"]


def _scan_index(folder: Path) -> tuple[dict[str, Tensor], list[str], set[str]]:
    index = read_json(folder / INDEX)
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        return {}, [f'{INDEX} must hold {{"weight_map": {{tensor: file}}}}'], set()
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    lost: set[str] = set()
    for file in dict.fromkeys(placed.values()):
        homed = {name for name, home in placed.items() if home == file}
        if file != Path(file).name or file in ("", ".", ".."):
            problems.append(f"{INDEX} names {file!r}, which is not a file of its own folder")
            lost |= homed
            continue
        if not os.path.isfile(folder / file):
            problems.append(f"{INDEX} names {file}, which does not exist")
            lost |= homed
            continue
        found, unreadable = _scan_file(folder / file)
        problems += unreadable
        for name, tensor in found.items():
            if placed.get(name) == file:
                tensors[name] = tensor
            else:
                problems.append(f"{file} holds {name}, which {INDEX} places in {placed.get(name, 'no file')}")
        lacking = homed - found.keys()
        lost |= lacking
        if not unreadable:
            problems += [f"{INDEX} places {name} in {file}, which lacks it" for name in sorted(lacking)]
    return tensors, problems, lost

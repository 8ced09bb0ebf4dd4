"""Our own checkpoint folder: `config.json`, the tokenizer's files, and the parameters in Orbax under `params/`."""

from pathlib import Path
from typing import Any

import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from twotower_jax import two_tower
from twotower_jax.config import Config, parse_config, read_json
from twotower_jax.errors import InputError
from twotower_jax.parameters import Parameter, flatten, unflatten

PARAMS = "params"
GROUP_BYTES = 2**27  # small parameters are written together, up to this much


def is_converted(folder: Path) -> bool:
    return (folder / PARAMS).is_dir()


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
        self._path = (folder / PARAMS).absolute()
        try:
            metadata = ocp.metadata(self._path)
            self._stored = dict(flatten(metadata.metadata))
            self.two_towers: bool = metadata.custom_metadata["two_towers"]
            self.odd_dtypes: dict[str, str] = metadata.custom_metadata["odd_dtypes"]
        except Exception as error:  # Orbax raises what its many storage drivers raise
            raise InputError(f"{self._path} is no checkpoint that convert wrote: {_first_line(error)}") from None
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

    def dtype(self, path: tuple[str, ...]) -> np.dtype:
        """The dtype that a parameter is stored in."""
        return np.dtype(self._stored[path].dtype)

    def read(self, path: tuple[str, ...]) -> np.ndarray:
        """One parameter."""
        wanted: dict[tuple[str, ...], Any] = dict.fromkeys(self._stored, ocp.PLACEHOLDER)
        wanted[path] = np.empty(self._stored[path].shape, self.dtype(path))
        try:
            return dict(flatten(ocp.load(self._path, unflatten(wanted))))[path]
        except Exception as error:
            raise InputError(f"cannot read {'/'.join(path)} of {self._path}: {_first_line(error)}") from None


class Writer:
    """Writes parameters one after the other; nothing under `folder` loads before `finish`."""

    def __init__(self, folder: Path, two_towers: bool, odd_dtypes: dict[str, str]):
        self._path = (folder / PARAMS).absolute()
        self._metadata = {"two_towers": two_towers, "odd_dtypes": odd_dtypes}
        self._group: dict[tuple[str, ...], np.ndarray] = {}

    def add(self, path: tuple[str, ...], p: Parameter, value: np.ndarray) -> None:
        if sum(v.nbytes for v in self._group.values()) + value.nbytes > GROUP_BYTES:
            self._flush()
        self._group[path] = value

    def _flush(self) -> None:
        if self._group:
            try:
                ocp.partial.save(self._path, unflatten(self._group), custom_metadata=self._metadata)
            except Exception as error:  # as above
                raise InputError(f"cannot write {self._path}: {_first_line(error)}") from None
            self._group = {}

    def finish(self) -> None:
        self._flush()
        ocp.partial.finalize(self._path)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__

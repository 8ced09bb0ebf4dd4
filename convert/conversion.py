"""One checkpoint folder into another: Hugging Face or ours in, ours or Hugging Face out."""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from convert.writer import HuggingFaceWriter
from twotower_jax import checkpoint, interrupts, sources, two_tower
from twotower_jax.config import BACKBONE_ARCHITECTURE, TWO_TOWER_ARCHITECTURE, as_two_towers
from twotower_jax.errors import InputError
from twotower_jax.parameters import Parameter, flatten, initialize
from twotower_jax.publishing import absent, published


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was made: its folder, whether it holds two towers, how many parameters."""

    target: Path
    two_towers: bool
    parameters: int


def convert(source: str | Path, target: str | Path, *, two_towers: bool = False, hf: bool = False) -> Conversion:
    """Converts a checkpoint, parameter by parameter.

    Host memory stays near the largest parameter's (a layer's stacked experts). The result is written beside `target`
    under another name and renamed when it is whole.

    Args:
      source: a folder in NVIDIA's TwoTower or backbone layout, a folder that this function wrote, a shipped model's
        name or a Hugging Face id.
      target: the folder to make; must not exist.
      two_towers: make a TwoTower of a backbone: both towers copies of it, time conditioning at identity.
      hf: write NVIDIA's layout (safetensors) instead of ours (Orbax).

    Raises:
      InputError: something about the source or the target is wrong; a line each. Nothing was written.
    """
    target = absent(sources.user_path(target))
    opened = sources.open_folder(sources.locate(source))
    if two_towers and opened.two_towers:
        raise InputError(f"{source} holds two towers already; --two-towers is for a backbone")
    result = _Result(opened, two_towers)
    with published(target) as unfinished:
        writer = HuggingFaceWriter if hf else checkpoint.Writer
        _write(result, writer(unfinished, result.two_towers, result.odd_dtypes()))
        try:
            for name in sources.TOKENIZER_FILES:
                if (opened.folder / name).is_file():
                    shutil.copyfile(opened.folder / name, unfinished / name)
            text = json.dumps(result.raw_config, indent=1)
            (unfinished / "config.json").write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write {target}: {error.strerror}") from None
    return Conversion(target, result.two_towers, result.parameters)


class _Result:
    """What is to be written: the source, or the TwoTower that a backbone becomes."""

    def __init__(self, source: Any, widen: bool):
        self.source, self.widen = source, widen
        self.two_towers: bool = source.two_towers or widen
        self.description: dict[tuple[str, ...], Parameter] = dict(
            flatten(two_tower.describe(source.config, self.two_towers))
        )
        raw = dict(source.raw_config)
        raw["architectures"] = [TWO_TOWER_ARCHITECTURE if self.two_towers else BACKBONE_ARCHITECTURE]
        self.raw_config = as_two_towers(raw, source.config) if widen else raw

    @property
    def parameters(self) -> int:
        config = self.source.config
        return sum(math.prod(config.shape(p.axes)) for p in self.description.values())

    def _origin(self, path: tuple[str, ...]) -> tuple[str, ...]:
        """Where the source keeps what becomes `path`."""
        return ("context", *path[1:]) if self.widen else path

    def _fresh(self, path: tuple[str, ...]) -> bool:
        return self.widen and path[:2] == ("denoiser", "time")

    def read(self, path: tuple[str, ...]) -> np.ndarray:
        if self._fresh(path):
            return np.asarray(self._time_conditioning[path[-1]])
        return self.source.read(self._origin(path))

    @functools.cached_property
    def _time_conditioning(self) -> dict[str, jax.Array]:
        description = two_tower.describe(self.source.config, True)["denoiser"]["time"]
        dtype = self.source.dtype(("context", "tower", "embeddings"))
        return initialize(description, self.source.config, jax.random.key(0), dtype)

    def odd_dtypes(self) -> dict[str, str]:
        """The source's, under the names that its tensors have in the result."""
        odd = self.source.odd_dtypes
        if not self.widen:
            return odd
        return {
            tower + name.removeprefix("backbone."): dtype
            for name, dtype in odd.items()
            for tower in ("context_tower.", "denoiser_tower.")
        }


def _write(result: _Result, writer: Any) -> None:
    with (
        interrupts.deferred() as arrived,
        tqdm(total=result.parameters, unit="parameters", unit_scale=True, disable=None) as bar,
    ):
        for path, parameter in result.description.items():
            if arrived:
                return
            bar.set_postfix_str("/".join(path))
            value = result.read(path)
            writer.add(path, parameter, value)
            bar.update(value.size)
            del value  # before the next one comes
        writer.finish()

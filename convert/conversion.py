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
from twotower_jax.config import (
    BACKBONE_ARCHITECTURE,
    TWO_TOWER_ARCHITECTURE,
    Config,
    as_two_towers,
    quantization,
    with_quantized_experts,
)
from twotower_jax.errors import InputError
from twotower_jax.layers import moe
from twotower_jax.layers.quantized import quantize
from twotower_jax.parameters import Parameter, flatten, initialize, whole
from twotower_jax.publishing import absent, published


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What was made: its folder, whether it holds two towers, how many parameters."""

    target: Path
    two_towers: bool
    parameters: int


def convert(
    source: str | Path,
    target: str | Path,
    *,
    two_towers: bool = False,
    hf: bool = False,
    experts: str | None = None,
) -> Conversion:
    """Converts a checkpoint, parameter by parameter.

    Host memory stays near the largest parameter's (a layer's stacked experts). The result is written beside `target`
    under another name and renamed when it is whole.

    Args:
      source: a folder in NVIDIA's TwoTower or backbone layout, a folder that this function wrote, a shipped model's
        name or a Hugging Face id.
      target: the folder to make; must not exist.
      two_towers: make a TwoTower of a backbone: both towers copies of it, time conditioning at identity.
      hf: write NVIDIA's layout (safetensors) instead of ours (Orbax).
      experts: quantise both towers' routed experts, `int8` or `int4`; all else stays as it is.

    Raises:
      InputError: something about the source or the target is wrong; a line each. Nothing was written.
    """
    target = absent(sources.user_path(target))
    opened = sources.open_folder(sources.locate(source))
    if two_towers and opened.two_towers:
        raise InputError(f"{source} holds two towers already; --two-towers is for a backbone")
    if opened.config.expert_form:
        raise InputError(f"{source} has {opened.config.expert_form} experts, which are not converted; give its source")
    if hf and experts:
        raise InputError(f"experts {experts} are of our own format; NVIDIA's layout (--to-hf) has no place for them")
    result = _Result(opened, two_towers, experts)
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
    """What is to be written: the source, or the TwoTower that a backbone becomes; with experts in some form."""

    def __init__(self, source: Any, widen: bool, experts: str | None):
        self.source, self.widen = source, widen
        self.two_towers: bool = source.two_towers or widen
        self.config: Config = with_quantized_experts(source.config, experts) if experts else source.config
        self.description: dict[tuple[str, ...], Parameter] = dict(
            flatten(two_tower.describe(self.config, self.two_towers))
        )
        self._plain = dict(flatten(two_tower.describe(source.config, self.two_towers)))
        self._scales: dict[tuple[str, ...], np.ndarray] = {}  # of what was read last
        raw = dict(source.raw_config)
        raw["architectures"] = [TWO_TOWER_ARCHITECTURE if self.two_towers else BACKBONE_ARCHITECTURE]
        raw = as_two_towers(raw, source.config) if widen else raw
        self.raw_config = raw | quantization(self.config)

    @property
    def parameters(self) -> int:
        return sum(map(self.size, self.description))

    def size(self, path: tuple[str, ...]) -> int:
        """How many parameters of the model it holds: none if it is the scales of others."""
        return math.prod(self.source.config.shape(self._plain[path].axes)) if path in self._plain else 0

    def _origin(self, path: tuple[str, ...]) -> tuple[str, ...]:
        """Where the source keeps what becomes `path`."""
        return ("context", *path[1:]) if self.widen else path

    def _fresh(self, path: tuple[str, ...]) -> bool:
        return self.widen and path[:2] == ("denoiser", "time")

    def read(self, path: tuple[str, ...]) -> np.ndarray:
        if self._fresh(path):
            return np.asarray(self._time_conditioning[path[-1]])
        if path in self._scales:
            return self._scales.pop(path)
        if self.description[path].quantized:
            return self._quantized(path)
        return self.source.read(self._origin(path))

    def _quantized(self, path: tuple[str, ...]) -> np.ndarray:
        """The integers of all experts, one after the other; their scales are read next."""
        bits, group = self.config.expert_bits, self.config.expert_group
        shape = self.source.config.shape(self._plain[path].axes)
        made = []
        for e in range(shape[0]):
            matrix = self.source.read(self._origin(path), ((slice(e, e + 1),), *whole(shape[1:])))[0]
            if not np.isfinite(matrix).all():
                name = self._plain[path].hf.format(e)
                raise InputError(f"{name} holds what is no number, for which {self.config.expert_form} has no place")
            made.append(jax.tree.map(np.asarray, quantize(matrix, bits, group)))
        self._scales[*path[:-1], moe.scales_of(path[-1])] = np.stack([expert.scales for expert in made])
        return np.stack([expert.values for expert in made])

    @functools.cached_property
    def _time_conditioning(self) -> dict[str, jax.Array]:
        description = two_tower.describe(self.source.config, True)["denoiser"]["time"]
        dtype = self.source.dtype(("context", "tower", "embeddings"))
        return initialize(description, self.source.config, jax.random.key(0), dtype)

    def odd_dtypes(self) -> dict[str, str]:
        """The source's, under the names that its tensors have in the result."""
        odd = {} if self.config.expert_form else self.source.odd_dtypes  # from quantised experts there is no way back
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
            bar.update(result.size(path))
            del value  # before the next one comes
        writer.finish()

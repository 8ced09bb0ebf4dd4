"""Writing NVIDIA's layout: sharded safetensors with an index."""

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from convert import layouts
from convert.huggingface import INDEX
from twotower_jax.errors import InputError
from twotower_jax.parameters import Parameter

SHARD_BYTES = 2**30


class HuggingFaceWriter:
    """Takes parameters one after the other; a shard is written as soon as it is full."""

    def __init__(self, folder: Path, two_towers: bool, odd_dtypes: dict[str, str]):
        self._folder, self._odd = folder, odd_dtypes
        self._shard: dict[str, np.ndarray] = {}
        self._shard_bytes = self._total = 0
        self._shards: list[list[str]] = []

    def add(self, path: tuple[str, ...], p: Parameter, value: np.ndarray) -> None:
        names = layouts.tensors(p, value.shape)
        for name, slice_ in zip(names, value if p.stacked else value[None], strict=True):
            dtype = np.dtype(self._odd.get(name, value.dtype))
            tensor = np.ascontiguousarray(layouts.to_hf(p, slice_)).astype(dtype, copy=False)
            if self._shard_bytes + tensor.nbytes > SHARD_BYTES:
                self._flush()
            # A copy, so that the shard does not keep the whole stacked parameter alive.
            self._shard[name] = tensor.copy() if tensor.base is not None else tensor
            self._shard_bytes += tensor.nbytes

    def _name(self, i: int, count: int) -> str:
        return f"model-{i + 1:05}-of-{count:05}.safetensors"

    def _flush(self) -> None:
        if self._shard:
            file = self._folder / self._name(len(self._shards), 0)
            try:
                save_file(self._shard, file, metadata={"format": "pt"})
                file.chmod(self._folder.stat().st_mode & 0o666)  # save_file's is for its owner alone
            except (SafetensorError, OSError) as error:
                raise InputError(f"cannot write {file}: {error}") from None
            self._shards.append(list(self._shard))
            self._total += self._shard_bytes
            self._shard, self._shard_bytes = {}, 0

    def finish(self) -> None:
        """Gives the shards their final names and writes the index."""
        self._flush()
        count = len(self._shards)
        placed = {}
        for i, names in enumerate(self._shards):
            (self._folder / self._name(i, 0)).rename(self._folder / self._name(i, count))
            placed |= dict.fromkeys(names, self._name(i, count))
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(placed.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

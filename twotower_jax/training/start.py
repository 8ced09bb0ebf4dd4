"""Where a run begins: the model's parameters, what of them is trained, the documents; and how its result is written."""

import contextlib
import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from twotower_jax import checkpoint, inputs, sources, two_tower
from twotower_jax.config import BACKBONE_ARCHITECTURE, Config, as_two_towers, parse_config, read_json
from twotower_jax.errors import InputError
from twotower_jax.layers import time_conditioning
from twotower_jax.parameters import flatten, initialize, unflatten
from twotower_jax.publishing import published
from twotower_jax.tokenizer import load_tokenizer
from twotower_jax.training.config import TrainingConfig
from twotower_jax.training.data import Documents
from twotower_jax.training.sharding import AllDevices, of_first_process, whole

BYTES = Path(__file__).parent / "bytes"  # a tokenizer in which a byte is the id `byte + 4`


class Fresh:
    """A backbone of random weights, in the place of a checkpoint folder."""

    two_towers = False

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        self.raw_config: dict[str, Any] = read_json(folder / "config.json")
        self.config: Config = parse_config(self.raw_config)
        self._params = initialize(
            two_tower.describe(self.config, False), self.config, jax.random.key(seed), jnp.dtype(jnp.float32)
        )
        self._description = dict(flatten(two_tower.describe(self.config, False)))

    def dtype(self, path: tuple[str, ...]) -> np.dtype:
        return self._description[path].dtype_in(jnp.bfloat16)

    def read(self, path: tuple[str, ...]) -> np.ndarray:
        return np.asarray(dict(flatten(self._params))[path])


class Start:
    """What a run trains.

    Attributes:
      config: dimensions.
      frozen: {"tower", "head"} of the context tower; nothing when it is trained itself.
      dtypes: of compute, for each trained parameter.
      documents: the data.
      fingerprint, tokenizer_fingerprint: of the model that the run starts from, and of its tokenizer.
      folder: of that model.
      eos: the id that ends a document.
      placement: the devices.

    Args:
      c: the run.
      mesh: of all devices, as `AllDevices` takes it.

    Raises:
      InputError: the model, the data or the devices do not fit the run.
    """

    def __init__(self, c: TrainingConfig, mesh: Mapping[str, int] | None = None):
        self._c = c
        folder = sources.locate(c.model)
        has_weights = checkpoint.is_converted(folder) or any(folder.glob("*.safetensors"))
        self.folder = folder
        self._source = sources.open_folder(folder) if has_weights else Fresh(folder, c.seed)
        self.config: Config = self._source.config
        if self.config.expert_form:
            raise InputError(f"{c.model} has {self.config.expert_form} experts, which are not trained; give its source")
        if c.objective == "ar" and self._source.two_towers:
            raise InputError(f"{c.model} has two towers; objective ar trains a backbone")
        if c.objective != "ar" and not has_weights:
            raise InputError(f"{c.model} has no weights; objective {c.objective} starts from a trained backbone")
        if c.mask_token_id >= self.config.vocab_size:
            raise InputError(f"mask_token_id {c.mask_token_id}: ids go from 0 to {self.config.vocab_size - 1}")
        self._tokenizer_file, tokenizer = self._tokenizer(folder)
        if not self.config.eos_token_ids:
            raise InputError(f"{c.model}: config.json names no eos_token_id, which ends a document")
        self.eos = self.config.eos_token_ids[0]
        self.documents = Documents(
            c.data.files,
            lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
            self.eos,
            self.config.vocab_size,
            None if c.objective == "ar" else c.mask_token_id,
        )
        self.tokenizer_fingerprint = zlib.crc32(self._tokenizer_file.read_bytes())
        self.fingerprint = zlib.crc32(np.ascontiguousarray(self._source.read(("context", "tower", "embeddings"))))
        self.placement = AllDevices(jax.devices(), self.config, mesh, c.data.rows, c.accumulate)
        dtype = inputs.dtype(c.dtype)
        description = two_tower.describe(self.config, c.objective != "ar")
        part = description["context" if c.objective == "ar" else "denoiser"]
        self.dtypes = jax.tree.map(lambda p: p.dtype_in(dtype), part)
        self.frozen = {}
        if c.objective == "denoise":
            self.frozen = self._read(description["context"], "context", dtype)

    def _tokenizer(self, folder: Path) -> tuple[Path, Tokenizer]:
        given = self._c.data.tokenizer
        home = BYTES if given == "bytes" else folder
        file = home / "tokenizer.json" if given in ("", "bytes") else Path(given)
        tokenizer = load_tokenizer(file.parent) if file.name == "tokenizer.json" else None
        if tokenizer is None:
            what = "does not exist" if not file.exists() else "is no tokenizer.json"
            raise InputError(f"{file} {what}; give data.tokenizer: a path to a tokenizer.json, or bytes")
        tokenizer.encode_special_tokens = given == "bytes"  # there even <mask> is six bytes of text
        size, vocab = tokenizer.get_vocab_size(), self.config.vocab_size
        if size > vocab:
            raise InputError(f"{file} has {size} tokens, more than the model's vocabulary of {vocab}")
        return file, tokenizer

    def _read(self, description: dict, tower: str, dtype: np.dtype) -> dict:
        """A tower's parameters on the devices, in `dtype` or float32."""
        params = {}
        for path, p in flatten(description):
            value = self._source.read((tower, *path)).astype(p.dtype_in(dtype))
            params[path] = self.placement.put(value, p)
        return unflatten(params)

    def trained(self) -> dict:
        """The parameters that are trained as the run begins, float32: a denoiser's are its own, or the backbone's."""
        description = two_tower.describe(self.config, True)
        dtype = np.dtype(np.float32)
        if self._c.objective == "ar":
            return self._read(description["context"], "context", dtype)
        own = description["denoiser"]
        if self._source.two_towers:
            return self._read(own, "denoiser", dtype)
        params = self._read({name: own[name] for name in ("tower", "head")}, "context", dtype)
        described = time_conditioning.describe(self.config)
        time = initialize(described, self.config, jax.random.key(self._c.seed), jnp.dtype(jnp.float32))
        return params | {"time": jax.tree.map(self.placement.put, jax.device_get(time), described)}

    def export(self, trained: dict, folder: Path) -> None:
        """Writes the model as a converted checkpoint, in the dtypes that the source has; an earlier one is replaced.

        Every process calls this.
        """
        ar = self._c.objective == "ar"
        description = two_tower.describe(self.config, not ar)
        values = {(("context" if ar else "denoiser"), *path): value for path, value in flatten(trained)}
        first = jax.process_index() == 0
        with published(folder, replace=True) if first else contextlib.nullcontext() as made:
            unfinished = of_first_process(made)
            writer = checkpoint.Writer(unfinished, not ar, {})
            for path, p in flatten(description):
                own = ("denoiser", *path[1:]) if self._c.objective == "tied" else path
                value = whole(values[own]) if own in values else self._source.read(path)
                like = ("context", *path[1:]) if path[1] != "time" else ("context", "tower", "embeddings")
                writer.add(path, p, value.astype(self._source.dtype(like)))
            writer.finish()
            if first:
                self._describe(unfinished)

    def _describe(self, folder: Path) -> None:
        """`config.json` and the tokenizer's files of the model that the run gives."""
        raw = dict(self._source.raw_config)
        ar = self._c.objective == "ar"
        raw = raw | {"architectures": [BACKBONE_ARCHITECTURE]} if ar else as_two_towers(raw, self.config)
        for name in sources.TOKENIZER_FILES:
            if (self._source.folder / name).is_file():
                shutil.copyfile(self._source.folder / name, folder / name)
        shutil.copyfile(self._tokenizer_file, folder / "tokenizer.json")
        (folder / "config.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")

"""The model that is measured: a loaded one, or random weights for a configuration."""

import dataclasses
import functools
import json
import re
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from twotower_jax import inputs, memory, sources, two_tower
from twotower_jax.config import Config, with_quantized_experts
from twotower_jax.errors import InputError
from twotower_jax.model import Model, load
from twotower_jax.parameters import Parameter, flatten, initialize, parameter_bytes, unflatten
from twotower_jax.placement import Group, Placement, Towers, place
from twotower_jax.programs import Programs
from twotower_jax.shapes import Shapes
from twotower_jax.sharding import WHOLE
from twotower_jax.tokenizer import load_tokenizer

SAMPLES = "samples.json"  # of a shipped model: what it can answer


@dataclasses.dataclass
class Subject:
    """What is measured, on one device.

    Attributes:
      name: as it was asked for.
      config: dimensions.
      dtype: of weights and activations.
      towers: the device.
      description: of the parameters, by tower.
      params: by tower, those that are there.
      prompts: what the model can answer, as token ids; None for random weights.
      programs: those that are compiled.
    """

    name: str
    config: Config
    dtype: np.dtype
    towers: Towers
    description: dict
    params: dict = dataclasses.field(default_factory=dict)
    prompts: list[list[int]] | None = None
    programs: Programs = dataclasses.field(default_factory=Programs)

    @property
    def group(self) -> Group:
        return self.towers.context

    @property
    def trained(self) -> bool:
        return self.prompts is not None

    def bytes(self, *names: str) -> int:
        """Of these towers' parameters."""
        return sum(parameter_bytes(self.config, self.description[name], self.dtype) for name in names)

    def hold(self, *names: str) -> dict:
        """The parameters of these towers, made if need be; those of others are let go of."""
        for name in set(self.params) - set(names):
            for leaf in jax.tree.leaves(self.params.pop(name)):
                leaf.delete()
        missing = [name for name in names if name not in self.params]
        if missing:
            what = f"{self.name}'s {' and '.join(missing)} tower in {self.dtype.name}"
            memory.require(self.bytes(*missing), self.group.devices[0], what)
        for name in missing:
            self.params |= random_parameters({name: self.description[name]}, self.config, self.dtype, self.group)
        return self.params

    @property
    def shapes(self) -> dict:
        """Of all parameters, whether they are there or not."""
        group = Shapes.like(self.group)
        return {name: group.parameters(one, self.dtype) for name, one in self.description.items()}

    def model(self, params: dict | None = None) -> Model:
        """Of the parameters that are there, or of these, which may be shapes."""
        return Model(self.config, params or self.params, self.towers, programs=self.programs)


def find(name: str, dtype: Any, prompts: str | None = None, experts: str | None = None) -> Subject:
    """What a name stands for: random weights for a `sources.configuration`, else a model as for `load`.

    Args:
      name: see above.
      dtype: bfloat16 or float32.
      prompts: a file of prompts, one a line, for a model that is loaded; a shipped one has its own.
      experts: of random weights, quantised in this form.

    Raises:
      InputError: there is no such model, or nothing that it could answer.
    """
    dtype = inputs.dtype(dtype)
    if sources.configuration(name).is_file():
        if prompts is not None:
            raise InputError(f"--prompts is for models that are loaded; {name} is a configuration, with random weights")
        config, backbone = sources.config_alone(name)
        if experts is not None:
            config = with_quantized_experts(config, experts)
        towers = place(Placement((0,), None if backbone else (0,)), config, two_towers=not backbone)
        return Subject(name, config, dtype, towers, two_tower.describe(config, not backbone))
    if experts is not None:
        raise InputError(f"--experts is for random weights; {name} is loaded as it is (twotower convert quantises)")
    folder = sources.locate(name, sources.configurations())
    asked = _prompts(folder, prompts)
    _, backbone = sources.config_alone(folder)
    model = load(folder, dtype=dtype, placement=Placement((0,), None if backbone else (0,)))
    description = two_tower.describe(model.config, model.two_towers)
    return Subject(name, model.config, dtype, model.towers, description, model.params, asked)


def _prompts(folder: Path, file: str | None) -> list[list[int]]:
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise InputError(f"{folder} has no tokenizer.json, so it cannot be asked anything")
    if file is not None:
        try:
            texts = [line for line in sources.user_path(file).read_text(encoding="utf-8").splitlines() if line]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {file}: {error}") from None
        if not texts:
            raise InputError(f"{file} has no prompts; it takes one a line")
    elif (folder / SAMPLES).is_file():
        texts = [sample["prompt"] for sample in json.loads((folder / SAMPLES).read_text(encoding="utf-8"))]
    else:
        raise InputError(f"what {folder} writes depends on what it is asked: give --prompts FILE, one a line")
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def random_parameters(description: dict, config: Config, dtype: np.dtype, group: Group) -> dict:
    """Fresh parameters on the device, an array after the other, so that no more than one is there in float32."""
    home, made, programs = NamedSharding(group.mesh, WHOLE), {}, {}
    for path, p in flatten(description):
        name = "/".join(path)
        alike = re.sub(r"^\w+/|\d+", "", name), p.axes  # one program for a parameter of both towers and all layers
        if alike not in programs:
            programs[alike] = jax.jit(functools.partial(_made, p, config, dtype), out_shardings=home)
        made[path] = programs[alike](jax.random.fold_in(jax.random.key(0), zlib.crc32(name.encode())))
    return unflatten(made)


def _made(p: Parameter, config: Config, dtype: np.dtype, key: jax.Array) -> jax.Array:
    return initialize(p, config, key, dtype)

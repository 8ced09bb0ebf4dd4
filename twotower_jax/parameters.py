"""The description of a parameter: where its shape, initial value, dtype and Hugging Face name come from."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from twotower_jax.config import Config

Initializer = Callable[..., jax.Array]
normal = nn.initializers.normal


Ranges = tuple[slice, ...]  # of an axis, one after the other
Part = tuple[Ranges, ...]  # of an array: the ranges of each axis


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One array of the model.

    Attributes:
      axes: a logical name for each axis; `Config.shape` gives their sizes, `placement` will give their mesh axes.
      hf: the Hugging Face tensor that holds it; with `{}` one tensor for each index of the first axis.
      layout: how a Hugging Face tensor lies: `same`; `linear`, (out, in) there and (in, out) here; `conv`, (C, 1, K)
        there and (K, C) here.
      init: initialiser, called with (key, shape, dtype).
      dtype: in which it is kept whatever the dtype of the model.
    """

    axes: tuple[str, ...]
    hf: str
    layout: Literal["same", "linear", "conv"] = "same"
    init: Initializer = nn.initializers.ones
    dtype: Any = None

    @property
    def stacked(self) -> bool:
        return "{}" in self.hf

    @property
    def quantized(self) -> bool:
        """Whether it holds integers or their scales, which no other dtype stands for."""
        return self.dtype is not None and np.dtype(self.dtype) != np.float32

    def dtype_in(self, model: jnp.dtype) -> np.dtype:
        """Its dtype in a model of some dtype."""
        return np.dtype(self.dtype or model)


def linear(inputs: str, outputs: str, hf: str, init: Initializer, **kwargs: Any) -> Parameter:
    """A matrix (in, out) without bias."""
    return Parameter((inputs, outputs), hf, "linear", init, **kwargs)


def declare(module: nn.Module, description: Mapping[str, Parameter], config: Config) -> dict[str, jax.Array]:
    """Declares the parameters of a Linen module and returns them by name."""
    return {name: module.param(name, p.init, config.shape(p.axes)) for name, p in description.items()}


def prefixed(prefix: str, tree: Any) -> Any:
    """The description with `prefix` before every Hugging Face name."""
    return jax.tree.map(lambda p: dataclasses.replace(p, hf=prefix + p.hf), tree)


def flatten(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Leaves of a nested dict with their paths, in the dict's order."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, (*path, name))
        else:
            yield (*path, name), value


def unflatten(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def whole(shape: Sequence[int]) -> Part:
    """All of an array."""
    return tuple((slice(0, size),) for size in shape)


def cut(array: Any, part: Part) -> np.ndarray:
    """A part of anything that takes an index."""
    if all(len(ranges) == 1 for ranges in part):
        return np.asarray(array[tuple(ranges[0] for ranges in part)])
    axis = next(i for i, ranges in enumerate(part) if len(ranges) > 1)
    return np.concatenate([cut(array, (*part[:axis], (r,), *part[axis + 1 :])) for r in part[axis]], axis)


def parameter_bytes(config: Config, description: Any, dtype: jnp.dtype) -> int:
    """Of a description's parameters in `dtype`; of what one device holds, where the config is."""
    return sum(math.prod(config.shape(p.axes)) * p.dtype_in(dtype).itemsize for p in jax.tree.leaves(description))


def initialize(description: Any, config: Config, key: jax.Array, dtype: jnp.dtype) -> Any:
    """Fresh parameters for a description; each depends on `key` and its place in the tree."""

    def one(index: int, p: Parameter) -> jax.Array:
        value = p.init(jax.random.fold_in(key, index), config.shape(p.axes), jnp.float32)
        return value.astype(p.dtype_in(dtype))

    leaves, structure = jax.tree.flatten(description)
    return jax.tree.unflatten(structure, [one(index, p) for index, p in enumerate(leaves)])

"""Devices whose arrays are shapes alone, so that what would run there can be compiled."""

from typing import Any

import jax
import numpy as np

from twotower_jax import sharding
from twotower_jax.placement import Group, Towers
from twotower_jax.programs import Program, Programs


class Shapes(Group):
    """A group whose arrays are shapes alone."""

    @classmethod
    def like(cls, group: Group) -> "Shapes":
        return cls(dict(zip(group.numbers, group.devices, strict=True)), group.whole, group.shards)

    def put(self, tree: Any, specs: Any) -> Any:
        def one(x: Any, home: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=home)

        return self.each(one, tree, specs)

    receive = put

    def parameters(self, description: dict, dtype: np.dtype) -> dict:
        def one(p):
            shape = jax.ShapeDtypeStruct(self.shape(p), p.dtype_in(dtype))
            return self.put(shape, sharding.spec(p))

        return jax.tree.map(one, description)


class TowersOfShapes(Towers):
    """Towers on such groups."""

    @classmethod
    def like(cls, towers: Towers) -> "TowersOfShapes":
        context = Shapes.like(towers.context)
        return cls(context, Shapes.like(towers.denoiser) if towers.split else towers.denoiser and context)

    def move(self, tree: Any, specs: Any, to: Group) -> Any:
        return to.receive(tree, specs)


class Ahead:
    """In the place of `Programs`: has these begin to compile, and gives the shapes of results."""

    def __init__(self, programs: Programs):
        self._programs = programs

    def run(self, group: Shapes, program: Program, *shapes: Any, what: str, **sizes: Any) -> Any:
        """See `Programs.run`."""
        return group.put(self._programs.ahead(group, program, *shapes, **sizes), program.outputs)


def shapes_of(tree: Any) -> Any:
    """The shapes of arrays, where they are."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)

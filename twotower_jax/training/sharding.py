"""Training over several devices and processes: rows and parameters are split, sums are over all."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from twotower_jax import sharding
from twotower_jax.config import Config
from twotower_jax.errors import InputError
from twotower_jax.parameters import Parameter
from twotower_jax.placement import Group, shards_of
from twotower_jax.sharding import DATA, MESH_AXES, ROWS, WHOLE

# What a device holds of a fused projection is no piece of it, so the compiler would gather it to cut it.
RULES = {axis: on for axis, on in sharding.RULES.items() if axis not in ("mamba_in", "conv_channels")}

LAST = {"hidden": 1, "modulation_hidden": 2}  # axes that activations would follow


class AllDevices:
    """All devices, of all processes, as one mesh, on which the compiler divides a step.

    Attributes:
      local_rows: numbers of the rows of a step that this process's devices hold, ascending.

    Args:
      devices: to be used.
      config: the model's dimensions.
      mesh: as `Placement` has it; by default all devices are `data`.
      rows: of a step; a part of it must divide evenly.
      parts: that a step is computed in, one after the other.
    """

    def __init__(
        self, devices: list[jax.Device], config: Config, mesh: Mapping[str, int] | None, rows: int, parts: int
    ):
        group = Group(dict(enumerate(devices)), config, shards_of(mesh or {}, config, len(devices)))
        if rows // parts % group.row_shards:
            hint = " (data and expert)" if group.row_shards < len(devices) else ""
            raise InputError(
                f"{rows // parts} rows a part (data.rows / accumulate) cannot be split over {group.row_shards} "
                f"devices{hint}; give a multiple of {group.row_shards}"
            )
        self._config, self._mesh = config, group.mesh
        self._shape = (parts, rows // parts)
        self._split = NamedSharding(self._mesh, PartitionSpec(None, *ROWS))
        numbers = np.arange(rows).reshape(self._shape)
        held = [numbers[index] for index in self._split.addressable_devices_indices_map(self._shape).values()]
        self.local_rows: np.ndarray = np.unique(np.concatenate([part.ravel() for part in held]))

    def _home(self, p: Parameter) -> NamedSharding:
        """Divided as a tower's is, where it can be; and over what is left of the mesh, or `data` alone, along the
        largest axis that this divides, of `LAST` only if there is no other.
        """
        shape, size = self._config.shape(p.axes), self._mesh.shape
        wanted = sharding.spec(p, RULES)
        axes = [(on,) if on and n % size[on] == 0 else () for n, on in zip(shape, wanted, strict=True)]
        used = {on for names in axes for on in names}
        left = tuple(name for name in MESH_AXES if name not in used)
        for more in (left, (DATA,)):
            free = [i for i, n in enumerate(shape) if n % math.prod(size[name] for name in (*axes[i], *more)) == 0]
            if free and math.prod(size[name] for name in more) > 1:
                axes[max(free, key=lambda i: (-LAST.get(p.axes[i], 0), shape[i]))] += more
                break
        return NamedSharding(self._mesh, PartitionSpec(*axes))

    def put(self, array: np.ndarray, p: Parameter) -> jax.Array:
        """A parameter, the same in every process, onto the devices."""
        return jax.make_array_from_callback(array.shape, self._home(p), lambda index: array[index])

    def optimizer_state(self, optimizer: optax.GradientTransformation, trained: Any) -> Any:
        """As it begins: of each parameter what is like it lies as it does."""
        homes = optax.tree.map_params(
            optimizer,
            lambda _, parameter: parameter.sharding,
            jax.eval_shape(optimizer.init, trained),
            trained,
            transform_non_params=lambda _: NamedSharding(self._mesh, WHOLE),
        )
        return jax.jit(optimizer.init, out_shardings=homes)(trained)

    def rows(self, batch: Any) -> Any:
        """(local rows, ...) in numpy onto the devices, as (parts, rows, ...) with rows split."""
        numbers = np.arange(self._shape[0] * self._shape[1]).reshape(self._shape)

        def one(array: np.ndarray) -> jax.Array:
            def held(index: tuple[slice, ...]) -> np.ndarray:
                return array[np.searchsorted(self.local_rows, numbers[index[:2]])]

            return jax.make_array_from_callback(self._shape + array.shape[1:], self._split, held)

        return jax.tree.map(one, batch)


def whole(array: jax.Array) -> np.ndarray:
    """All of an array, in every process."""
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def whole_position(position: np.ndarray, local_rows: np.ndarray) -> np.ndarray:
    """The rows' positions (B, 2), each from the process that reads the row."""
    if jax.process_count() == 1:
        return position
    own = np.zeros_like(position)
    own[local_rows] = position[local_rows]
    halves = np.asarray(multihost_utils.process_allgather(own.view(np.int32)))  # JAX has no int64 unless asked to
    return halves.sum(0, dtype=np.int32).view(np.int64)


def of_first_process(path: Path | None) -> Path:
    """A path that the first process knows."""
    if jax.process_count() == 1:
        return path
    text = np.zeros(4096, np.uint8)
    if path is not None:
        raw = os.fsencode(path)
        text[: len(raw)] = np.frombuffer(raw, np.uint8)
    return Path(os.fsdecode(bytes(multihost_utils.broadcast_one_to_all(text)).rstrip(b"\0")))


def any_process(told: bool) -> bool:
    """Whether any process was told."""
    return told if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(told)).any())

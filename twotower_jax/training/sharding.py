"""Training over several devices and processes: rows and parameters are split, sums are over all."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from twotower_jax.errors import InputError

AXIS = "data"


class AllDevices:
    """All devices, of all processes, in one axis.

    Attributes:
      local_rows: numbers of the rows of a step that this process's devices hold, ascending.

    Args:
      devices: to be used.
      rows: of a step; a part of it must divide evenly.
      parts: that a step is computed in, one after the other.
    """

    def __init__(self, devices: list[jax.Device], rows: int, parts: int):
        if rows // parts % len(devices):
            raise InputError(
                f"{rows // parts} rows a part (data.rows / accumulate) cannot be split over {len(devices)} devices; "
                f"give a multiple of {len(devices)}"
            )
        self._mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
        self._shape = (parts, rows // parts)
        self._split = NamedSharding(self._mesh, PartitionSpec(None, AXIS))
        numbers = np.arange(rows).reshape(self._shape)
        held = [numbers[index] for index in self._split.addressable_devices_indices_map(self._shape).values()]
        self.local_rows: np.ndarray = np.unique(np.concatenate([part.ravel() for part in held]))

    def of(self, tree: Any) -> Any:
        """A sharding for each array: its largest axis that all devices divide, or a copy on each."""
        count = self._mesh.size

        def one(leaf) -> NamedSharding:
            spec: list[str | None] = [None] * len(leaf.shape)
            axes = [i for i, size in enumerate(leaf.shape) if size % count == 0 and size >= count]
            if axes and count > 1:
                spec[max(axes, key=lambda i: leaf.shape[i])] = AXIS
            return NamedSharding(self._mesh, PartitionSpec(*spec))

        return jax.tree.map(one, tree)

    def put(self, tree: Any) -> Any:
        """Arrays, the same in every process, onto the devices."""
        return jax.tree.map(
            lambda array, sharding: jax.make_array_from_callback(array.shape, sharding, lambda index: array[index]),
            tree,
            self.of(tree),
        )

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

"""Training over several devices: rows and parameters are split, sums are over all."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from twotower_jax.errors import InputError

AXIS = "data"


class Placement:
    """All devices in one axis.

    Args:
      devices: to be used.
      rows: of a part of a step; must divide evenly.
    """

    def __init__(self, devices: list[jax.Device], rows: int):
        if rows % len(devices):
            raise InputError(
                f"{rows} rows a part (data.rows / accumulate) cannot be split over {len(devices)} devices; "
                f"give a multiple of {len(devices)}"
            )
        self._mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)

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
        """Arrays onto the devices."""
        return jax.device_put(tree, self.of(tree))

    def rows(self, batch: Any) -> Any:
        """(parts, rows, ...) in numpy, the same in every process, onto the devices, rows split."""
        sharding = NamedSharding(self._mesh, PartitionSpec(None, AXIS))

        def one(array: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        return jax.tree.map(one, batch)

"""Arrays from the devices of one tower to those of the other, where these may be in another process.

JAX moves arrays between processes inside a program alone, so this is one, of all devices of both towers: each of the
first sends what it holds to the one at its place among the second.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TOWER = "tower"


def between_processes(source: Mesh, target: Mesh, tree: Any, specs: Any) -> Any:
    """Arrays on a mesh, onto another of the same shape.

    Args:
      source: the mesh that they are on.
      target: the mesh that they go to.
      tree: arrays of at least one axis.
      specs: their `PartitionSpec`s, a tree or a prefix of one.
    """
    leaves, structure = jax.tree.flatten(tree)
    flat = jax.tree.leaves(
        jax.tree.map(lambda s, x: jax.tree.map(lambda _: s, x), specs, tree, is_leaf=_is_spec), is_leaf=_is_spec
    )
    both = Mesh(np.stack([source.devices, target.devices]), (TOWER, *source.axis_names))
    wide = tuple(_wider(spec) for spec in flat)
    local = [device for device in target.devices.flat if device.process_index == jax.process_index()]
    sent = [_with_blanks(x, NamedSharding(both, spec), local) for x, spec in zip(leaves, wide, strict=True)]
    came = _exchange(both, wide)(sent)
    homes = [NamedSharding(target, spec) for spec in flat]
    return structure.unflatten([_at(x, home, local, y) for x, home, y in zip(leaves, homes, came, strict=True)])


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _wider(spec: PartitionSpec) -> PartitionSpec:
    """Of an array that is one tower's upon the other's along its first axis."""
    first = spec[0] if len(spec) else None
    axes = () if first is None else (first,) if isinstance(first, str) else first
    return PartitionSpec((TOWER, *axes), *spec[1:])


def _with_blanks(x: jax.Array, home: NamedSharding, local: list[jax.Device]) -> jax.Array:
    """An array over both towers' devices: what the first hold, and room on the second."""
    shape = x.sharding.shard_shape(x.shape)
    blanks = [_blank(shape, x.dtype, device) for device in local]
    arrays = [shard.data for shard in x.addressable_shards] + blanks
    return jax.make_array_from_single_device_arrays((2 * x.shape[0], *x.shape[1:]), home, arrays, dtype=x.dtype)


@functools.cache
def _blank(shape: tuple[int, ...], dtype: np.dtype, device: jax.Device) -> jax.Array:
    return jax.device_put(jnp.zeros(shape, dtype), device)


@functools.cache
def _exchange(both: Mesh, specs: tuple[PartitionSpec, ...]):
    def send(arrays):
        return [jax.lax.ppermute(x, TOWER, [(0, 1)]) for x in arrays]

    specs = list(specs)
    return jax.jit(jax.shard_map(send, mesh=both, in_specs=(specs,), out_specs=specs, check_vma=False))


def _at(like: jax.Array, home: NamedSharding, local: list[jax.Device], came: jax.Array) -> jax.Array:
    """What came, on the second tower's devices alone."""
    arrays = [shard.data for shard in came.addressable_shards if shard.device in local]
    return jax.make_array_from_single_device_arrays(like.shape, home, arrays, dtype=like.dtype)

"""Which devices hold which tower, and programs on them."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from twotower_jax import sharding, transfer
from twotower_jax.config import Config, Shards
from twotower_jax.errors import InputError, short
from twotower_jax.parameters import Parameter
from twotower_jax.sharding import DATA, EXPERT, MESH_AXES, TENSOR


@dataclasses.dataclass(frozen=True)
class Placement:
    """A wish, of which what is not said is chosen: one device for both towers; of two or more, half for each.

    Attributes:
      context_devices: the context tower's devices, as numbers among `jax.devices()`.
      denoiser_devices: the denoiser's; the same ones, or none of them and as many.
      mesh: how many of a tower's devices each axis has: `data` (rows), `expert`, `tensor` (heads, channels,
        vocabulary). What is left goes to `data`. By default experts are divided as far as they can be.
    """

    context_devices: Sequence[int] | None = None
    denoiser_devices: Sequence[int] | None = None
    mesh: Mapping[str, int] | None = None


class Group:
    """The devices of a tower, or of both, as a mesh.

    Attributes:
      numbers: of the devices, in the mesh's order.
      mesh: of the axes `data`, `expert`, `tensor`.
      whole: the model's dimensions.
      config: those of what one device holds.
    """

    def __init__(self, devices: Mapping[int, jax.Device], config: Config, shards: Shards):
        self.numbers = list(devices)
        shape = tuple(getattr(shards, axis) for axis in MESH_AXES)
        self.mesh = Mesh(np.asarray(list(devices.values())).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
        self.whole, self.config = config, sharding.share(config, shards)

    @property
    def shards(self) -> Shards:
        return self.config.shards

    @property
    def row_shards(self) -> int:
        """What the number of rows must be a multiple of."""
        return self.shards.data * self.shards.expert

    @property
    def devices(self) -> list[jax.Device]:
        return list(self.mesh.devices.flat)

    @property
    def local_devices(self) -> list[jax.Device]:
        """Those of this process."""
        return [device for device in self.devices if device.process_index == jax.process_index()]

    def each(self, one: Callable, tree: Any, specs: Any) -> Any:
        """`one(array, its sharding)` for every leaf; the specs may be a prefix of the tree."""

        def of(spec: PartitionSpec, subtree: Any) -> Any:
            return jax.tree.map(lambda array: one(array, NamedSharding(self.mesh, spec)), subtree)

        return jax.tree.map(of, specs, tree, is_leaf=lambda x: isinstance(x, PartitionSpec))

    def put(self, tree: Any, specs: Any) -> Any:
        """The host's arrays, the same in every process, onto the devices."""

        def one(array: Any, home: NamedSharding) -> jax.Array:
            array = np.asarray(array)
            return jax.make_array_from_callback(array.shape, home, lambda index: array[index], dtype=array.dtype)

        return self.each(one, tree, specs)

    def receive(self, tree: Any, specs: Any) -> Any:
        """Arrays of other devices of this process, onto these."""
        return self.each(jax.device_put, tree, specs)

    def fetch(self, tree: Any) -> Any:
        """All of every array, on the host of every process."""
        return jax.tree.map(np.asarray if jax.process_count() == 1 else _from_all, tree)

    def shape(self, p: Parameter) -> tuple[int, ...]:
        """Of a parameter as an array over all devices: larger than its own where several hold the same heads."""
        sizes = [getattr(self.shards, on) if on else 1 for on in sharding.spec(p)]
        return tuple(n * size for n, size in zip(self.config.shape(p.axes), sizes, strict=True))

    def parameter(self, p: Parameter, dtype: np.dtype, read: Callable[[sharding.Part], np.ndarray]) -> jax.Array:
        """A parameter on the devices, of which each part that this process holds is read once."""
        homes: dict[Any, list[jax.Device]] = {}
        for place, device in np.ndenumerate(self.mesh.devices):
            if device.process_index == jax.process_index():
                part = sharding.part(p, self.whole, self.shards, dict(zip(MESH_AXES, place, strict=True)))
                homes.setdefault(tuple(tuple((r.start, r.stop) for r in axis) for axis in part), []).append(device)
        arrays = []
        for ranges, devices in homes.items():
            value = read(tuple(tuple(slice(*r) for r in axis) for axis in ranges)).astype(dtype, copy=False)
            arrays += [jax.device_put(value, device) for device in devices]
            jax.block_until_ready(arrays)  # so that the host's memory is free again
        return jax.make_array_from_single_device_arrays(
            self.shape(p), NamedSharding(self.mesh, sharding.spec(p)), arrays, dtype=dtype
        )


def _from_all(array: jax.Array) -> np.ndarray:
    """All of an array of which this process may hold some, or nothing."""
    value, held = np.zeros(array.shape, array.dtype), np.zeros(array.shape, bool)
    for shard in array.addressable_shards:
        value[shard.index], held[shard.index] = shard.data, True
    values, helds = multihost_utils.process_allgather((value, held))
    return np.take_along_axis(values, np.argmax(helds, axis=0)[None], axis=0)[0]


@dataclasses.dataclass(frozen=True)
class Towers:
    """Where the towers are.

    Attributes:
      context: the context tower's devices.
      denoiser: the denoiser's; None for a backbone.
      idle: numbers of devices that neither has, where nobody chose them.
    """

    context: Group
    denoiser: Group | None
    idle: tuple[int, ...] = ()

    @property
    def split(self) -> bool:
        """Whether the towers have devices of their own."""
        return self.denoiser is not None and self.denoiser is not self.context

    def of(self, tower: str) -> Group:
        """The devices of a tower, `context` or `denoiser`."""
        return self.denoiser if tower == "denoiser" else self.context

    @property
    def groups(self) -> list[Group]:
        return [self.context, self.denoiser] if self.split else [self.context]

    def move(self, tree: Any, specs: Any, to: Group) -> Any:
        """Arrays of one group to the other, from each device to the one at its place in the other mesh."""
        if jax.process_count() == 1:
            return to.receive(tree, specs)
        source = self.context if to is self.denoiser else self.denoiser
        return transfer.between_processes(source.mesh, to.mesh, tree, specs)

    def __str__(self) -> str:
        idle = f"; {', '.join(map(str, self.idle))} idle" if self.idle else ""
        if self.split:
            return f"context tower on {_say(self.context)}; denoiser on {_say(self.denoiser)}{idle}"
        return f"{'the model' if self.denoiser is None else 'both towers'} on {_say(self.context)}{idle}"


def _say(group: Group) -> str:
    sizes = {axis: getattr(group.shards, axis) for axis in MESH_AXES if getattr(group.shards, axis) > 1}
    numbers = list(map(str, group.numbers))
    numbers = numbers if len(numbers) <= 4 else [numbers[0], "...", numbers[-1]]
    mesh = f" ({', '.join(f'{axis}={size}' for axis, size in sizes.items())})" if sizes else ""
    return f"{group.devices[0].platform} {', '.join(numbers)}{mesh}"


def place(wish: Placement, config: Config, two_towers: bool, devices: Sequence[jax.Device] | None = None) -> Towers:
    """The towers' devices.

    Args:
      wish: what was asked for.
      config: the model's dimensions.
      two_towers: whether there is a denoiser.
      devices: to choose from; all by default.

    Raises:
      InputError: there are no such devices, or the model cannot be divided so.
    """
    if not isinstance(wish, Placement):
        raise InputError(f"placement must be a tt.Placement, not {short(wish)}")
    devices = jax.devices() if devices is None else list(devices)
    given = (wish.context_devices, wish.denoiser_devices)
    if not two_towers:
        if wish.denoiser_devices is not None:
            raise InputError("denoiser devices are given, but this model is a backbone: it has a context tower alone")
        numbers = [range(len(devices)) if wish.context_devices is None else wish.context_devices]
    elif given == (None, None):
        half = len(devices) // 2
        numbers = [range(half), range(half, 2 * half)] if half else [range(1)] * 2
    elif None in given:
        lacking = "context" if wish.context_devices is None else "denoiser"
        raise InputError(f"the {lacking} tower's devices are not given; give both towers', the same ones or others")
    else:
        numbers = list(given)
    chosen = [_chosen(n, devices) for n in numbers]
    if two_towers and set(chosen[0]) != set(chosen[1]):
        if common := set(chosen[0]) & set(chosen[1]):
            raise InputError(
                f"both towers have device {', '.join(map(str, sorted(common)))}, and other devices too; "
                "give them the same devices or none in common"
            )
        if len(chosen[0]) != len(chosen[1]):
            raise InputError(
                f"the context tower has {len(chosen[0])} devices, the denoiser {len(chosen[1])}; give each as many, "
                "for states move between them device by device"
            )
    without = set(range(jax.process_count())) - {device.process_index for group in chosen for device in group.values()}
    if without:
        raise InputError(
            f"process {min(without)} has none of the towers' devices; give each process some, or start fewer"
        )
    shards = shards_of(wish.mesh, config, len(chosen[0]))
    context = Group(chosen[0], config, shards)
    used = {number for group in chosen for number in group}
    idle = tuple(i for i in range(len(devices)) if i not in used) if given == (None, None) else ()
    if not two_towers or set(chosen[0]) == set(chosen[1]):
        return Towers(context, context if two_towers else None, idle)
    return Towers(context, Group(chosen[1], config, shards), idle)


def shared(wish: Placement, two_towers: bool) -> Placement:
    """Both towers on all devices, if nobody chose any."""
    if wish.context_devices is not None or wish.denoiser_devices is not None:
        return wish
    every = range(jax.device_count())
    return dataclasses.replace(wish, context_devices=every, denoiser_devices=every if two_towers else None)


def _chosen(numbers: Sequence[int], devices: Sequence[jax.Device]) -> dict[int, jax.Device]:
    """Devices by their numbers."""
    try:
        numbers = list(numbers)
    except TypeError:
        raise InputError(f"devices are given as a list of numbers such as [0, 1], not {short(numbers)}") from None
    for number in numbers:
        if not isinstance(number, int | np.integer) or isinstance(number, bool) or not 0 <= number < len(devices):
            raise InputError(f"there is no device {number!r}; there are {len(devices)}, counted from 0")
    if not numbers or len(set(numbers)) < len(numbers):
        raise InputError(f"devices {', '.join(map(str, numbers))}: give at least one, and none twice")
    return {number: devices[number] for number in numbers}


def shards_of(mesh: Mapping[str, int] | None, config: Config, count: int) -> Shards:
    """The sizes of a mesh of `count` devices, of which some, or none, are given as `Placement.mesh`.

    Raises:
      InputError: it is no mesh of so many.
    """
    if mesh is None:
        return _default_shards(config, count)
    if not isinstance(mesh, Mapping):
        raise InputError(f'a mesh is given as {{"expert": 4, "tensor": 2}}, not {short(mesh)}')
    for axis, size in mesh.items():
        if axis not in MESH_AXES:
            raise InputError(f"mesh axis {axis!r} is unknown; known are {', '.join(MESH_AXES)}")
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise InputError(f"mesh {axis}={size!r}: give a whole number of 1 or more")
    product = math.prod(mesh.values())
    if count % product or (DATA in mesh and product != count):
        asked = ",".join(f"{axis}={size}" for axis, size in mesh.items())
        raise InputError(f"mesh {asked} is of {product} devices, not of {count}")
    return Shards(**{DATA: count // product, **mesh})


def _default_shards(config: Config, count: int) -> Shards:
    """Experts divided as far as they can be, then heads and channels; what is left are rows."""
    expert = math.gcd(count, config.experts) or 1
    for tensor in range(count // expert, 0, -1):
        if count // expert % tensor == 0:
            shards = Shards(data=count // expert // tensor, expert=expert, tensor=tensor)
            try:
                sharding.share(config, shards)
            except InputError:
                continue
            return shards
    raise AssertionError("tensor=1 always divides")


def parse_devices(option: str, text: str | None) -> list[int] | None:
    """`0,1` as a list; None if not given.

    Raises:
      InputError: it is of another form.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise InputError(f"{option} takes numbers of devices such as 0,1, not {text!r}")
    return [int(part) for part in parts]


def parse_mesh(text: str) -> dict[str, int]:
    """`expert=4,tensor=2` as a mapping.

    Raises:
      InputError: it is of another form.
    """
    found = {}
    for item in text.split(","):
        axis, equals, size = item.strip().partition("=")
        if not equals or not (size.isdecimal() and len(size) < 10) or axis in found:
            raise InputError(f"a mesh is given as {EXPERT}=4,{TENSOR}=2, each axis once, not {text!r}")
        found[axis] = int(size)
    return found

"""What one device holds of a tower that several share: rows, experts, and the heads, channels and vocabulary.

A mesh has three axes. Rows of a batch are divided over `data` and `expert`, experts over `expert`, and over `tensor`
what `RULES` names: Megatron's way, in which a layer's first matrix is divided by columns, its last by rows, and one sum
over the devices ends the layer (arXiv 1909.08053). What no rule names lies whole on every device.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
from jax.sharding import PartitionSpec

from twotower_jax import two_tower
from twotower_jax.config import ATTENTION, MAMBA, MLP, MOE, Config, Shards
from twotower_jax.errors import InputError
from twotower_jax.parameters import Parameter, Part, Ranges
from twotower_jax.state import KVCache, LayerState, MambaState, TowerState

MESH_AXES = DATA, EXPERT, TENSOR = ("data", "expert", "tensor")
ROWS = PartitionSpec((DATA, EXPERT))  # of an array whose first axis is a batch's rows
WHOLE = PartitionSpec()
LOGITS = PartitionSpec(*ROWS, None, TENSOR)

RULES = {
    "vocab": TENSOR,
    "mamba_in": TENSOR,
    "mamba_inner": TENSOR,
    "mamba_heads": TENSOR,
    "conv_channels": TENSOR,
    "query": TENSOR,
    "kv": TENSOR,
    "experts": EXPERT,
    "expert_width": TENSOR,
    "shared_width": TENSOR,
    "mlp_width": TENSOR,
}


def spec(p: Parameter, rules: Mapping[str, str] = RULES) -> PartitionSpec:
    """The mesh axes of a parameter's axes.

    Raises:
      ValueError: two of them would be divided over the same mesh axis.
    """
    axes = [rules.get(axis) for axis in p.axes]
    used = [axis for axis in axes if axis is not None]
    if len(set(used)) < len(used):
        raise ValueError(f"{p.hf}: its axes {', '.join(p.axes)} collide on the mesh axes {', '.join(used)}")
    return PartitionSpec(*axes)


def share(config: Config, shards: Shards) -> Config:
    """The dimensions of what one device holds.

    Where a device's query heads are no whole groups, it holds a key/value head for each run of them that has one in
    common, so that some are on several devices; the same goes for Mamba-2's groups.

    Raises:
      InputError: a dimension that must be divided cannot be.
    """
    c = config

    def divide(name: str, size: int, kind: str = "", by: str = TENSOR) -> int:
        """A size over the devices, if the model has such layers."""
        count = getattr(shards, by)
        if kind not in c.pattern:
            return size
        if size % count:
            raise InputError(f"mesh {by}={count} does not divide the model's {size} {name}; {_choices(size)}")
        return size // count

    divide("experts", c.experts, MOE, EXPERT)
    heads = divide("query heads", c.attention_heads, ATTENTION)
    mamba_heads = divide("Mamba-2 heads", c.mamba_heads, MAMBA)
    return dataclasses.replace(
        c,
        vocab_size=divide("tokens of vocabulary", c.vocab_size),
        mamba_heads=mamba_heads,
        mamba_groups=_runs(mamba_heads, c.mamba_heads, c.mamba_groups) if MAMBA in c.pattern else c.mamba_groups,
        attention_heads=heads,
        kv_heads=_runs(heads, c.attention_heads, c.kv_heads) if ATTENTION in c.pattern else c.kv_heads,
        expert_width=divide("channels of an expert", c.expert_width, MOE),
        shared_width=divide("channels of the shared expert", c.shared_width, MOE),
        mlp_width=divide("channels of the MLP", c.mlp_width, MLP),
        shards=shards,
        whole=config,
    )


def _choices(size: int) -> str:
    divisors = [str(n) for n in range(2, min(size, 64) + 1) if size % n == 0]
    return f"{', '.join(divisors) or 'nothing up to 64'} would"


def _runs(heads: int, all_heads: int, groups: int) -> int:
    """How many runs of consecutive heads, each within one group, a device's heads are."""
    return heads // math.gcd(heads, all_heads // groups)


def _of_groups(whole: Config, device: int, shards: int, kind: str) -> list[int]:
    """The groups of a device's runs of heads."""
    heads, groups = (
        (whole.mamba_heads, whole.mamba_groups) if kind == "mamba" else (whole.attention_heads, whole.kv_heads)
    )
    runs = _runs(heads // shards, heads, groups)
    return [(device * runs + run) * groups // (runs * shards) for run in range(runs)]


def held(axis: str, whole: Config, mesh_axis: str | None, device: int, shards: int) -> Ranges:
    """The ranges of a logical axis that the device at a place of its mesh axis holds, in the order that they lie in."""
    (size,) = whole.shape((axis,))
    if mesh_axis is None or shards == 1:
        return (slice(0, size),)

    def part(start: int, size: int) -> list[slice]:
        return [slice(start + size * device // shards, start + size * (device + 1) // shards)]

    def groups(start: int, width: int, kind: str) -> list[slice]:
        return [slice(start + g * width, start + (g + 1) * width) for g in _of_groups(whole, device, shards, kind)]

    inner, states = whole.mamba_width, whole.mamba_groups * whole.state_size
    conv = [(0, "part", inner), (inner, "groups", whole.state_size), (inner + states, "groups", whole.state_size)]
    match axis:
        case "kv":
            return tuple(groups(0, whole.head_dim, "attention"))
        case "conv_channels" | "mamba_in":
            first = inner if axis == "mamba_in" else 0  # z stands before x, B and C, dt after them
            ranges = part(0, inner) if first else []
            for start, how, width in conv:
                ranges += part(first + start, width) if how == "part" else groups(first + start, width, "mamba")
            return tuple(ranges + (part(first + whole.conv_channels, whole.mamba_heads) if first else []))
    return tuple(part(0, size))


@functools.cache
def specs(config: Config, *towers: str) -> dict:
    """The mesh axes of the parameters of some towers."""
    return jax.tree.map(spec, {name: two_tower.describe(config, True)[name] for name in towers})


def part(p: Parameter, whole: Config, shards: Shards, place: Mapping[str, int]) -> Part:
    """What the device at a place of the mesh (by axis) holds of a parameter."""
    axes = zip(p.axes, spec(p), strict=True)
    return tuple(held(axis, whole, on, place.get(on, 0), getattr(shards, on) if on else 1) for axis, on in axes)


def state_spec(config: Config) -> TowerState:
    """The mesh axes of a tower's state: rows, and heads or channels."""

    def layer(kind: str) -> LayerState:
        if kind == MAMBA:
            return MambaState(conv=PartitionSpec(*ROWS, None, TENSOR), ssm=PartitionSpec(*ROWS, TENSOR))
        if kind == ATTENTION:
            return KVCache(key=PartitionSpec(*ROWS, TENSOR), value=PartitionSpec(*ROWS, TENSOR))
        return None

    return TowerState(layers=tuple(map(layer, config.pattern)), length=ROWS)

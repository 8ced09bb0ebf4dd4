"""What a piece must move and compute at least, whatever the program.

Bytes: weights once, of experts those that its tokens chose; of the embeddings the rows that are looked up; states and
caches as far as they are read or written. What passes between operations could stay on the chip, logits too, unless
they are what a piece takes or gives. Operations: of products, convolution, scan and attention, two for a multiplication
with its sum.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from twotower_jax.benchmark.machine import Rates
from twotower_jax.config import ATTENTION, MAMBA, MOE, Config
from twotower_jax.layers import time_conditioning
from twotower_jax.layers.moe import scales_of
from twotower_jax.state import KVCache, MambaState, empty_state
from twotower_jax.tower import DESCRIPTIONS

EXPERTS = ("up", "down", *map(scales_of, ("up", "down")))

# The parameters of the last layer that has a state, without which the state after it could not be.
FOR_STATE = {MAMBA: ("in_proj", "conv_weight", "conv_bias", "dt_bias", "a_log"), ATTENTION: ("key", "value")}


@dataclasses.dataclass(frozen=True)
class Work:
    """Bytes to move and operations to do."""

    bytes: float = 0.0
    operations: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.operations + other.operations)

    def seconds(self, rates: Rates) -> float:
        """The least time at these rates, if all is moved while all is computed."""
        return max(self.bytes / rates.bytes, self.operations / rates.operations)

    def bound(self, rates: Rates) -> str:
        """Which of the two takes longer."""
        return "bytes" if self.bytes / rates.bytes >= self.operations / rates.operations else "operations"


@dataclasses.dataclass(frozen=True)
class Pass:
    """A tower's pass.

    Attributes:
      rows, length: B and L.
      context: tokens that each row has read before.
      experts: different experts that the tokens chose, for each layer of experts.
      vocabulary: different tokens that are looked up.
      causal: see `state.Span`.
      writes: whether the state after is kept.
      hidden: whether hidden states are wanted; else the state alone, for which the last layers are not needed.
    """

    rows: int
    length: int
    context: int
    experts: Sequence[float]
    vocabulary: int
    causal: bool = True
    writes: bool = True
    hidden: bool = True


def array_bytes(tree: Any) -> int:
    """Of all arrays, or shapes; of numbers smaller than a byte as they lie packed."""
    return sum(math.prod(x.shape) * _bits(x.dtype) // 8 for x in jax.tree.leaves(tree))


def _bits(dtype: jnp.dtype) -> int:
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return 8 * dtype.itemsize


def of_pass(config: Config, tower: dict, made: Pass) -> Work:
    """Of a pass of a tower, given its parameters (or their shapes)."""
    c, pattern = config, config.pattern
    tokens = made.rows * made.length
    embeddings = tower["embeddings"]
    total = Work(made.vocabulary * array_bytes(embeddings) / c.vocab_size)
    stateful = [i for i, kind in enumerate(pattern) if kind in (MAMBA, ATTENTION)]
    end = len(pattern) if made.hidden else max(stateful, default=-1) + 1
    chosen = iter(made.experts)
    layers = jax.eval_shape(lambda: empty_state(c, 1, 1, embeddings.dtype)).layers
    for i, kind in enumerate(pattern[:end]):
        layer, sizes = tower[f"layers_{i}"], DESCRIPTIONS[kind](c)
        whole = made.hidden or i < end - 1
        used = layer["mixer"] if whole else {name: layer["mixer"][name] for name in FOR_STATE[kind] if name in sizes}
        once = {name: value for name, value in used.items() if kind != MOE or name not in EXPERTS}
        matrices = [c.shape(sizes[name].axes) for name in once]
        multiplied = sum(math.prod(shape) for shape in matrices if len(shape) == 2)
        if kind == MOE:
            stacked = array_bytes([used[name] for name in EXPERTS if name in used])
            total += Work(next(chosen) * stacked / c.experts)
            multiplied += c.experts_per_token * 2 * c.hidden_size * c.expert_width
        total += Work(array_bytes((layer["norm"], once)), 2 * tokens * multiplied)
        total += _state(c, layers[i], made, whole)
    if made.hidden:
        total += Work(array_bytes(tower["norm_f"]))
    return total


def _state(c: Config, layer: MambaState | KVCache | None, made: Pass, attends: bool) -> Work:
    """What a layer's own state of one row with one position costs, and what is done with it."""
    tokens = made.rows * made.length
    match layer:
        case MambaState():
            elements = c.mamba_heads * c.mamba_head_dim * c.state_size
            moved = made.rows * array_bytes(layer) * (1 + made.writes)
            return Work(moved, tokens * elements * (5 if attends else 3))
        case KVCache():
            read = made.context if attends else 0
            positions = read + (made.length if made.writes else 0)
            seen = made.context + ((made.length + 1) / 2 if made.causal else made.length)
            done = 4 * c.attention_heads * c.head_dim * seen if attends else 0
            return Work(made.rows * positions * array_bytes(layer), tokens * done)
    return Work()


def of_time_conditioning(config: Config, time: dict, rows: int) -> Work:
    """Of the network of t, for each row's own."""
    shapes = [config.shape(p.axes) for p in time_conditioning.describe(config).values()]
    return Work(array_bytes(time), 2 * rows * sum(math.prod(shape) for shape in shapes if len(shape) == 2))


def of_head(config: Config, head: Any, positions: float) -> Work:
    """Of the logits of so many positions, which nobody keeps."""
    return Work(array_bytes(head), 2 * positions * config.hidden_size * config.vocab_size)


def of_logits(config: Config, positions: int) -> Work:
    """Of reading or writing logits, float32, with one operation each."""
    logits = positions * config.vocab_size
    return Work(4 * logits, logits)

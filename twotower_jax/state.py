"""What a tower carries between calls: keys and values, convolution tails, SSM states."""

import math

import jax
import jax.numpy as jnp
from flax import struct

from twotower_jax.config import ATTENTION, MAMBA, Config


@struct.dataclass
class MambaState:
    """conv (B, K - 1, C): the last raw inputs of the convolution, newest last; ssm (B, H, P, N), float32."""

    conv: jax.Array
    ssm: jax.Array


@struct.dataclass
class KVCache:
    """key and value (B, J, T, P), of which a row's first `TowerState.length` positions hold something."""

    key: jax.Array
    value: jax.Array


LayerState = MambaState | KVCache | None


@struct.dataclass
class TowerState:
    """One entry a layer (None for experts and MLPs), and the number of tokens that each row has read, (B,) int32."""

    layers: tuple[LayerState, ...]
    length: jax.Array


@struct.dataclass
class Span:
    """The L new positions of a call.

    Attributes:
      start: (B,) int32, tokens read before.
      count: (B,) int32, how many of the L new positions are real; padding stands after them and changes nothing.
      causal: a position sees itself and those before it; otherwise all of the span.
    """

    start: jax.Array
    count: jax.Array
    causal: bool = struct.field(pytree_node=False, default=True)


def empty_state(config: Config, rows: int, capacity: int, dtype: jnp.dtype) -> TowerState:
    """The state of `rows` rows that have read nothing, with room for `capacity` tokens each."""
    c = config

    def layer(kind: str) -> LayerState:
        if kind == MAMBA:
            return MambaState(
                conv=jnp.zeros((rows, c.conv_kernel - 1, c.conv_channels), dtype),
                ssm=jnp.zeros((rows, c.mamba_heads, c.mamba_head_dim, c.state_size), jnp.float32),
            )
        if kind == ATTENTION:
            shape = (rows, c.kv_heads, capacity, c.head_dim)
            return KVCache(key=jnp.zeros(shape, dtype), value=jnp.zeros(shape, dtype))
        return None

    return TowerState(layers=tuple(map(layer, c.pattern)), length=jnp.zeros(rows, jnp.int32))


def state_bytes(config: Config, rows: int, capacity: int, dtype: jnp.dtype) -> int:
    """Bytes of `empty_state`, without making it; `capacity` may be larger than any array can be."""
    one = jax.eval_shape(lambda: empty_state(config, 1, 1, dtype))
    caches = [layer for layer in one.layers if isinstance(layer, KVCache)]

    def size(tree) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    return rows * (size(one) + (capacity - 1) * size(caches))

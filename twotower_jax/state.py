"""What a tower carries between calls: keys and values, convolution tails, SSM states."""

import functools
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


@struct.dataclass
class MambaTrace:
    """What a pass over L positions leaves of a Mamba layer, from which the state after any number of them is made.

    Attributes:
      inputs: (B, K - 1 + L, C), the convolution's raw inputs, from the tail before on.
      weighted: (B, L, H, P) float32, dt x.
      decay: (B, L, H) float32, dt a.
      b: (B, L, G, N) float32.
    """

    inputs: jax.Array
    weighted: jax.Array
    decay: jax.Array
    b: jax.Array


ExpertLoad = jax.Array  # (E,) int32: how often each expert was chosen, from passes with `Span.count_experts`

LayerState = MambaState | MambaTrace | KVCache | ExpertLoad | None


@struct.dataclass
class TowerState:
    """What each row has read.

    The state before every block of packed rows (training) has a row for each block in `length`, `first` and the Mamba
    states, and one cache for the blocks of a row together.

    Attributes:
      layers: an entry a layer, None for MLPs and for experts that are not counted.
      length: (B,) int32, the number of tokens read, where the next one goes in the cache.
      first: (B,) int32, the first position of the cache that is of the row's own document; None means 0.
    """

    layers: tuple[LayerState, ...]
    length: jax.Array
    first: jax.Array | None = None


@struct.dataclass
class Packing:
    """Documents packed one after the other in rows of L positions, as in training.

    Attributes:
      segments: (B, L) int32, the number from 1 of a position's document within its row; 0 is padding.
      blocks: (B, M) int32, where blocks begin, multiples of the block size: a pass returns the state before each of
        these, not the one after the row.
      block_size: S.
    """

    segments: jax.Array
    blocks: jax.Array
    block_size: int = struct.field(pytree_node=False)


@struct.dataclass
class Span:
    """The L new positions of a call.

    Attributes:
      start: (B,) int32, tokens read before.
      count: (B,) int32, how many of the L new positions are real; padding stands after them and changes nothing.
      causal: a position sees itself and those before it; otherwise all of the span.
      first: (B,) int32, the first cached position that a row sees; None means 0.
      packing: set in a pass over packed documents, which starts from the empty state; `count` is not used then.
      count_experts: the experts' layers return their load as their state.
      trace: Mamba layers return a `MambaTrace`.
    """

    start: jax.Array
    count: jax.Array
    causal: bool = struct.field(pytree_node=False, default=True)
    first: jax.Array | None = None
    packing: Packing | None = None
    count_experts: bool = struct.field(pytree_node=False, default=False)
    trace: bool = struct.field(pytree_node=False, default=False)

    def real(self, length: int) -> jax.Array:
        """(B, length) bool: which of the new positions hold a token."""
        if self.packing is not None:
            return self.packing.segments > 0
        return jnp.arange(length) < self.count[:, None]


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
    one, position = _bytes_of_one(config, dtype)
    return rows * (one + (capacity - 1) * position)


@functools.cache
def _bytes_of_one(config: Config, dtype: jnp.dtype) -> tuple[int, int]:
    """Of a row's state with one position, and of each further one."""
    one = jax.eval_shape(lambda: empty_state(config, 1, 1, dtype))
    caches = [layer for layer in one.layers if isinstance(layer, KVCache)]

    def size(tree) -> int:
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    return size(one), size(caches)

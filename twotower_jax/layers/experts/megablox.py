"""Products of sorted choices with their experts' matrices on TPUs, by JAX's own kernels for that.

`jax.lax.ragged_dot` would copy `up`, whose summed axis is its last, to bring it into another layout.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from twotower_jax.layers.experts.tiles import Sorted, by_expert

ROWS = 128  # choices that are multiplied together
BLOCK = 4 * 2**20  # bytes of weights, at most, that are brought into a core at a time, while as many are multiplied


def _part(size: int, most: int) -> int:
    """How much of an axis is taken at a time: all of it, or a multiple of 128 that wastes little."""
    if size <= most:
        return size
    parts = -(-size // most)
    return -(-size // (parts * 128)) * 128


@dataclasses.dataclass(frozen=True)
class Megablox:
    """`grouped.Kernels`; with `interpret` a CPU runs them, slowly."""

    interpret: bool = False

    def choices(self, experts, total):
        return by_expert(experts, total)

    def widen(self, x, up, choices, activation):
        chosen = choices.order.size // x.shape[0]
        return activation(self._product(x[choices.order // chosen], up, choices, True)).astype(x.dtype)

    def narrow(self, hidden, down, choices):
        place = jnp.zeros_like(choices.order).at[choices.order].set(jnp.arange(choices.order.size), unique_indices=True)
        return self._product(hidden, down, choices, False)[place]

    def outer(self, hidden, x, choices):
        rows = x[choices.order // (choices.order.size // x.shape[0])]
        tiling = (ROWS, _part(hidden.shape[1], 1024), _part(x.shape[1], 1024))
        sizes = choices.stops - choices.starts
        with _precision(x.dtype):
            return tgmm(_padded(hidden).T, _padded(rows), sizes, x.dtype, tiling, interpret=self.interpret)

    def _product(self, rows, weights, choices: Sorted, widens):
        width, depth = weights.shape[1:] if widens else weights.shape[:0:-1]
        most = BLOCK // weights.dtype.itemsize // width
        tiling = (ROWS, _part(depth, max(128, most)), _part(width, 2048))
        sizes = choices.stops - choices.starts
        options = {"transpose_rhs": widens, "interpret": self.interpret}
        with _precision(rows.dtype):
            return gmm(_padded(rows), weights, sizes, jnp.float32, tiling, **options)[: rows.shape[0]]


def _padded(rows: jax.Array) -> jax.Array:
    return jnp.pad(rows, ((0, -rows.shape[0] % ROWS), (0, 0)))


def _precision(dtype: jnp.dtype) -> contextlib.AbstractContextManager:
    """In which float32 means float32."""
    return jax.default_matmul_precision("highest") if dtype == jnp.float32 else contextlib.nullcontext()

"""Matrices in 8 or 4 bits a number, with a scale for each group of neighbours in a row.

Of experts (E, F, D) both matrices have rows of D numbers, a row for each of the F hidden channels: then `tensor`
divides scales as it divides weights, and where a group is a whole row its scale is a factor of the channel, applied to
what goes into or comes out of a product of small integers.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

INTEGERS = {8: jnp.int8, 4: jnp.uint8}
SCALE = jnp.bfloat16
ENDS = [-7 - quarter / 4 for quarter in range(9)]


@flax.struct.dataclass
class Quantized:
    """An array (..., D) of numbers `integer * scale of its group`, of D / n numbers each.

    Attributes:
      values: int8 (..., D), from -127 to 127; or uint8 (..., D / 2): number j in the lower half of byte j, number
        j + D / 2 in the upper half, from -8 to 7, plus 8.
      scales: bfloat16 (..., n).
    """

    values: jax.Array
    scales: jax.Array

    @property
    def bits(self) -> int:
        """8 or 4."""
        return 8 if self.values.dtype == jnp.int8 else 4

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for."""
        return (*self.values.shape[:-1], self.values.shape[-1] * 8 // self.bits)

    @property
    def group(self) -> int:
        """How many numbers have a scale in common."""
        return self.shape[-1] // self.scales.shape[-1]

    def __getitem__(self, index) -> "Quantized":
        """Of the axes before the last."""
        return Quantized(self.values[index], self.scales[index])

    def integers(self) -> jax.Array:
        """(..., D) int8."""
        if self.bits == 8:
            return self.values
        halves = (self.values & 15, self.values >> 4)
        return jnp.concatenate([half.astype(jnp.int8) - 8 for half in halves], axis=-1)

    def dequantized(self, dtype: jnp.dtype) -> jax.Array:
        """The array (..., D); in float32 exactly, in bfloat16 rounded once."""
        integers = self.integers().reshape(*self.scales.shape, self.group).astype(jnp.float32)
        return (integers * self.scales.astype(jnp.float32)[..., None]).reshape(self.shape).astype(dtype)


def initializers(bits: int, deviation: float) -> tuple[Callable, Callable]:
    """Of values and scales that stand for numbers of this standard deviation."""

    def values(key, shape, dtype=jnp.float32):
        return jax.random.randint(key, shape, *((-127, 128) if bits == 8 else (0, 256))).astype(dtype)

    return values, nn.initializers.constant(deviation * math.sqrt(12) / 2**bits)


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantize(matrix: jax.Array, bits: int, group: int) -> Quantized:
    """The nearest numbers (..., D) of 8 or 4 bits, D a multiple of `group`, of 4 bits half of it.

    With 8 bits a group's largest number is 127 of its steps. With 4 bits it is -7 to -9 of them, whichever of `ENDS`
    leaves the least squared error; the steps end at -8 and 7, beyond which numbers are cut off.
    """
    groups = matrix.astype(jnp.float32).reshape(*matrix.shape[:-1], -1, group)
    largest = jnp.take_along_axis(groups, jnp.abs(groups).argmax(-1, keepdims=True), axis=-1)
    if bits == 8:
        integers, scales, _ = _rounded(groups, largest / 127, -127, 127)
        return Quantized(integers.reshape(matrix.shape), scales[..., 0])
    tried = [_rounded(groups, largest / end, -8, 7) for end in ENDS]
    best = jnp.argmin(jnp.stack([error for *_, error in tried]), axis=0)[None]
    integers, scales = (
        jnp.take_along_axis(jnp.stack(of_all), best, axis=0)[0] for of_all in list(zip(*tried, strict=True))[:2]
    )
    low, high = jnp.split((integers + 8).astype(jnp.uint8).reshape(matrix.shape), 2, axis=-1)
    return Quantized(low | high << 4, scales[..., 0])


def _rounded(groups, scales, least, most):
    """Of groups (..., n, g) the integers in steps of scales (..., n, 1); the scales, rounded; the squared errors."""
    scales = scales.astype(SCALE)
    steps = jnp.where(scales == 0, 1, scales).astype(jnp.float32)
    integers = jnp.clip(jnp.round(groups / steps), least, most)
    error = jnp.square(integers * steps - groups).sum(-1, keepdims=True)
    return integers.astype(jnp.int8), scales, error

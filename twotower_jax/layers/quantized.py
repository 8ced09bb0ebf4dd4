"""Matrices in 8 or 4 bits a number, with a scale for each group of neighbours in a row.

Of experts (E, F, D) both matrices have rows of D numbers, a row for each of the F hidden channels: then `tensor`
divides scales as it divides weights, and where a group is a whole row its scale is a factor of the channel, applied to
what goes into or comes out of a product of small integers.
"""

import flax.struct
import jax
import jax.numpy as jnp

BITS = {"int8": 8, "int4": 4}
SCALE = jnp.bfloat16


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


def group_size(bits: int, width: int) -> int | None:
    """How many numbers of a row of `width` have a scale in common: all of 8 bits; of 4 the largest multiple of 8, up to
    64, that divides half a row. None if there is no such.
    """
    if bits == 8:
        return width
    return next((size for size in range(64, 0, -8) if width % (2 * size) == 0), None)

"""Matrix products at the precision that their dtype promises."""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def einsum(equation: str, *operands: jax.Array, out: jnp.dtype | None = None) -> jax.Array:
    """`jnp.einsum` in which float32 means float32.

    By default a GPU may multiply float32 in TF32 and a TPU in bfloat16, which moves a token now and then.

    Args:
      equation: as for `jnp.einsum`.
      *operands: arrays of one dtype.
      out: dtype of the result; the operands' by default. The sum is always float32: asked for less, a GPU rounds the
        terms of a one-row product before it adds them.
    """
    precision = HIGHEST if operands[0].dtype == jnp.float32 else None
    product = jnp.einsum(equation, *operands, precision=precision, preferred_element_type=jnp.float32)
    return product.astype(out or operands[0].dtype)


def project(x: jax.Array, weight: jax.Array, out: jnp.dtype | None = None) -> jax.Array:
    """x (..., D) by a matrix (D, E): (..., E). See `einsum`."""
    if x.size > x.shape[-1]:
        return einsum("...d,de->...e", x, weight, out=out)
    # XLA for GPUs makes a product of one row a sum over products, which it may write out, in float32: up to nine times
    # the bytes of the matrix.
    return jax.lax.platform_dependent(
        x.reshape(1, -1),
        weight,
        cuda=lambda x, weight: einsum("rd,de->re", jnp.broadcast_to(x, (2, x.shape[1])), weight, out=out)[:1],
        default=lambda x, weight: einsum("rd,de->re", x, weight, out=out),
    ).reshape(*x.shape[:-1], -1)


def apart(x: jax.Array) -> jax.Array:
    """x, in a product of its own: XLA for GPUs joins products that share an operand and, to do so, copies the others,
    be they a layer's experts or a key/value cache.
    """
    return jax.lax.optimization_barrier(x)

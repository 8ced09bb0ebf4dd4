"""RMSNorm, over the whole width or within groups."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, groups: int = 1) -> jax.Array:
    """x (..., C) over its root mean square within each of `groups` runs of C / groups channels, times weight (C,).

    In float32 inside; the result has x's dtype.
    """
    grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1)
    normed = grouped * jax.lax.rsqrt(jnp.mean(jnp.square(grouped), axis=-1, keepdims=True) + eps)
    return (normed.reshape(x.shape) * weight.astype(jnp.float32)).astype(x.dtype)

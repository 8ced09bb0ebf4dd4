"""RMSNorm, over the whole width or within groups."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def rms_norm(
    x: jax.Array,
    weight: jax.Array,
    eps: float,
    groups: int = 1,
    together: Callable[[jax.Array], jax.Array] = lambda means: means,
) -> jax.Array:
    """x (..., C) over its root mean square within each of `groups` runs of C / groups channels, times weight (C,).

    In float32 inside; the result has x's dtype. Where a group is of several runs, here or on other devices, `together`
    makes the means of the squares (..., groups) the groups' own.
    """
    grouped = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1)
    means = together(jnp.mean(jnp.square(grouped), axis=-1))
    normed = grouped * jax.lax.rsqrt(means[..., None] + eps)
    return (normed.reshape(x.shape) * weight.astype(jnp.float32)).astype(x.dtype)

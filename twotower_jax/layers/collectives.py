"""Sums over the devices that share a tower, in float32; each is nothing where one device holds all.

They stand inside `shard_map`, on mesh axes named as in `sharding`.
"""

import jax
import jax.numpy as jnp

from twotower_jax.config import Config


def tensor_sum(x: jax.Array, c: Config) -> jax.Array:
    """The sum of the devices' parts of a product whose summed axis is divided over `tensor`."""
    return jax.lax.psum(x, "tensor") if c.shards.tensor > 1 else x


def tensor_index(c: Config) -> jax.Array | int:
    """A device's place on the axis `tensor`."""
    return jax.lax.axis_index("tensor") if c.shards.tensor > 1 else 0


def any_row(flags: jax.Array, c: Config) -> jax.Array:
    """Whether a flag of any row (B, ...), on any device, is set: () bool."""
    found = flags.any()
    if c.shards.data * c.shards.expert > 1:
        found = jax.lax.psum(found.astype(jnp.int32), ("data", "expert")) > 0
    return found


def row_sum(flags: jax.Array, c: Config) -> jax.Array:
    """How many rows (B,), on all devices, have their flag set: () int32."""
    count = flags.sum(dtype=jnp.int32)
    return jax.lax.psum(count, ("data", "expert")) if c.shards.data * c.shards.expert > 1 else count

"""adaLN-single: one network of t for all layers, and a table of (shift, scale, gate) a layer that is added to it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from twotower_jax.config import TIME_FEATURES, Config
from twotower_jax.layers.linear import project
from twotower_jax.parameters import Parameter, declare, linear, normal


def _frequencies() -> np.ndarray:
    """exp(-ln(10000) i / 128) in float32, to the last bit as the reference had it.

    The last bit counts: at t = 1 angles reach 1000, and what one of them is off by is added to every layer and
    position (a last bit moved logits of a small model by up to 7e-4). The exponents are rounded as the reference
    rounds them; the exponential is rounded correctly but for i = 13, a near tie (0.473 of a last bit) that the
    reference's rounds up.
    """
    half = TIME_FEATURES // 2
    exponents = np.float32(-np.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    frequencies[13] = np.nextafter(frequencies[13], np.float32(1))
    return frequencies


FREQUENCIES = _frequencies()
IDENTITY = (0.0, 0.0, 1.0)  # shift, scale, gate


def describe(c: Config) -> dict[str, Parameter]:
    """Initialised to the identity: the network gives 0 and the tables (0, 0, 1), whatever t is."""
    weights, zeros = normal(c.initializer_range), nn.initializers.zeros

    def identity(key, shape, dtype=jnp.float32):
        return jnp.broadcast_to(jnp.array(IDENTITY, dtype)[:, None], shape)

    return {
        "embed_in": linear("time_features", "hidden", "t_embedder.mlp.0.weight", weights),
        "embed_in_bias": Parameter(("hidden",), "t_embedder.mlp.0.bias", init=zeros),
        "embed_out": linear("hidden", "hidden", "t_embedder.mlp.2.weight", weights),
        "embed_out_bias": Parameter(("hidden",), "t_embedder.mlp.2.bias", init=zeros),
        "block": linear("hidden", "modulation_hidden", "t_block.1.weight", zeros),
        "block_bias": Parameter(("modulation_hidden",), "t_block.1.bias", init=zeros),
        "tables": Parameter(("layers", "modulation", "hidden"), "scale_shift_tables.{}", init=identity),
    }


def sinusoid(t: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Features (B, 256) of t (B,) in [0, 1], cosines first, float32.

    In bfloat16 t and 1000 t are rounded to bfloat16, as the released model knew them in training (937.5 becomes 936).
    """

    def rounded(x: jax.Array) -> jax.Array:
        # A cast there and back may be simplified away; reduce_precision may not.
        return jax.lax.reduce_precision(x, 8, 7) if dtype == jnp.bfloat16 else x

    angles = rounded(1000 * rounded(t.astype(jnp.float32)))[:, None] * FREQUENCIES
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeConditioning(nn.Module):
    """t (B,), the masked share of each row's block -> modulation (layers, B, 3, D): shift, scale, gate."""

    config: Config

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        p = declare(self, describe(self.config), self.config)
        shared = self.shared(p, t)
        return p["tables"][:, None] + shared.reshape(-1, 3, self.config.hidden_size)

    def shared(self, p: dict[str, jax.Array], t: jax.Array) -> jax.Array:
        """The part that all layers share, (B, 3 D)."""
        dtype = p["embed_in"].dtype
        x = project(sinusoid(t, dtype).astype(dtype), p["embed_in"]) + p["embed_in_bias"]
        x = project(nn.silu(x), p["embed_out"]) + p["embed_out_bias"]
        return project(nn.silu(x), p["block"]) + p["block_bias"]

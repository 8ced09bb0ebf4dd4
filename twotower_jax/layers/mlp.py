"""The dense MLP: down(relu(up(x))^2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from twotower_jax.config import Config
from twotower_jax.layers.collectives import tensor_sum
from twotower_jax.layers.linear import project
from twotower_jax.parameters import Parameter, declare, linear, normal
from twotower_jax.state import Span


def describe(c: Config, width: str = "mlp_width") -> dict[str, Parameter]:
    weights = normal(c.initializer_range)
    return {
        "up": linear("hidden", width, "up_proj.weight", weights),
        "down": linear(width, "hidden", "down_proj.weight", weights),
    }


def relu2(x: jax.Array) -> jax.Array:
    return jnp.square(nn.relu(x))


def mlp(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """x (..., D), up (D, F), down (F, D) -> (..., D) float32."""
    return project(relu2(project(x, up)), down, out=jnp.float32)


class MLP(nn.Module):
    """x (B, L, D), None, Span -> y (B, L, D), None."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, state: None, span: Span) -> tuple[jax.Array, None]:
        p = declare(self, describe(self.config), self.config)
        return tensor_sum(mlp(x, p["up"], p["down"]), self.config).astype(x.dtype), None

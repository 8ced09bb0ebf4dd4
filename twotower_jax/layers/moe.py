"""The mixture of experts: a sigmoid router with group-limited choice, routed experts, a shared one."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from twotower_jax.config import Config
from twotower_jax.layers import mlp, quantized
from twotower_jax.layers.collectives import tensor_sum
from twotower_jax.layers.expert_parallel import routed_over_devices
from twotower_jax.layers.linear import project
from twotower_jax.parameters import Parameter, declare, linear, normal
from twotower_jax.state import ExpertLoad, Span


def describe(c: Config) -> dict[str, Parameter]:
    weights = normal(c.initializer_range)
    return {
        "router": linear("hidden", "routes", "gate.weight", weights, dtype=jnp.float32),
        "correction": Parameter(
            ("routes",), "gate.e_score_correction_bias", init=nn.initializers.zeros, dtype=jnp.float32
        ),
        **_describe_experts("up", "same", c),
        **_describe_experts("down", "linear", c),
        "shared_up": linear("hidden", "shared_width", "shared_experts.up_proj.weight", weights),
        "shared_down": linear("shared_width", "hidden", "shared_experts.down_proj.weight", weights),
    }


def scales_of(name: str) -> str:
    """The parameter that holds the scales of quantised experts."""
    return f"{name}_scales"


def _describe_experts(name: str, layout: str, c: Config) -> dict[str, Parameter]:
    """A matrix of all experts; where they are quantised its integers, and their scales."""
    hf = f"experts.{{}}.{name}_proj.weight"
    if c.expert_form is None:
        return {name: Parameter(("experts", "expert_width", "hidden"), hf, layout, normal(c.initializer_range))}
    values, scales = quantized.initializers(c.expert_bits, c.initializer_range)
    axes, dtype = ("experts", "expert_width"), quantized.INTEGERS[c.expert_bits]
    return {
        name: Parameter((*axes, "expert_row"), hf, layout, values, dtype),
        scales_of(name): Parameter((*axes, "expert_scales"), hf, layout, scales, quantized.SCALE),
    }


def _experts(p: dict[str, jax.Array], name: str) -> jax.Array | quantized.Quantized:
    return quantized.Quantized(p[name], p[scales_of(name)]) if scales_of(name) in p else p[name]


def route(x: jax.Array, router: jax.Array, correction: jax.Array, c: Config) -> tuple[jax.Array, jax.Array]:
    """Each token's experts and their weights, in float32.

    The choice goes by the scores plus `correction`, within the `expert_groups_kept` groups whose two best such scores
    have the largest sum; the weights are the scores without it.

    Args:
      x: (tokens, D).
      router: (D, E) float32.
      correction: (E,) float32.
      c: the config.

    Returns:
      experts (tokens, k) int32 and weights (tokens, k) float32.
    """
    scores = jax.nn.sigmoid(project(x.astype(jnp.float32), router))
    biased = scores + correction
    if c.expert_groups > 1:
        grouped = biased.reshape(-1, c.expert_groups, c.experts // c.expert_groups)
        best = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0].sum(-1)
        _, groups = jax.lax.top_k(best, c.expert_groups_kept)
        kept = jax.nn.one_hot(groups, c.expert_groups, dtype=bool).any(-2)
        biased = jnp.where(kept[..., None], grouped, 0.0).reshape(biased.shape)
    _, experts = jax.lax.top_k(biased, c.experts_per_token)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if c.normalize_weights:
        weights /= weights.sum(-1, keepdims=True) + 1e-20
    return experts, weights * c.routed_scale


class MoE(nn.Module):
    """x (B, L, D), None, Span -> y (B, L, D), None or the experts' load."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, state: None, span: Span) -> tuple[jax.Array, ExpertLoad | None]:
        p = declare(self, describe(self.config), self.config)
        tokens = x.reshape(-1, x.shape[-1])
        experts, weights = route(tokens, p["router"], p["correction"], self.config)
        real = span.real(x.shape[1]).reshape(-1, 1)  # padding has no experts: those that it alone chose are not read
        experts, weights = jnp.where(real, experts, self.config.experts), jnp.where(real, weights, 0)
        y = routed_over_devices(tokens, experts, weights, _experts(p, "up"), _experts(p, "down"), self.config)
        y = tensor_sum(y + mlp.mlp(tokens, p["shared_up"], p["shared_down"]), self.config)
        load = None
        if span.count_experts:
            load = jnp.zeros(self.config.experts, jnp.int32).at[experts].add(1, mode="drop")
        return y.astype(x.dtype).reshape(x.shape), load

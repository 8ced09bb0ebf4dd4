"""The mixture of experts: a sigmoid router with group-limited choice, routed experts, a shared one. Drops no token."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from twotower_jax.config import Config
from twotower_jax.layers import mlp
from twotower_jax.layers.linear import apart, einsum
from twotower_jax.parameters import Parameter, declare, linear, normal
from twotower_jax.state import ExpertLoad, Span

# Up to here one product over all experts; beyond it its (E, tokens, F) activations would take too much memory.
TOKENS_AT_ONCE = 1024

TILE = 128  # tokens of one expert that a CPU multiplies together


def describe(c: Config) -> dict[str, Parameter]:
    weights = normal(c.initializer_range)
    return {
        "router": linear("hidden", "experts", "gate.weight", weights, float32=True),
        "correction": Parameter(("experts",), "gate.e_score_correction_bias", init=nn.initializers.zeros, float32=True),
        "up": Parameter(("experts", "hidden", "expert_width"), "experts.{}.up_proj.weight", "linear", weights),
        "down": Parameter(("experts", "expert_width", "hidden"), "experts.{}.down_proj.weight", "linear", weights),
        "shared_up": linear("hidden", "shared_width", "shared_experts.up_proj.weight", weights),
        "shared_down": linear("shared_width", "hidden", "shared_experts.down_proj.weight", weights),
    }


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
    scores = jax.nn.sigmoid(einsum("td,de->te", x.astype(jnp.float32), router))
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


def routed(x: jax.Array, experts: jax.Array, weights: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """The weighted sum of the chosen experts' outputs, by the way that moves the fewest bytes for so many tokens.

    Args:
      x: (tokens, D).
      experts: (tokens, k) int32.
      weights: (tokens, k) float32.
      up: (E, D, F).
      down: (E, F, D).

    Returns:
      (tokens, D) float32.
    """
    x = apart(x)
    tokens, total = x.shape[0], up.shape[0]
    if 3 * experts.size <= total:  # a picked expert is read, written and read again
        return _picked(x, experts, weights, up, down)
    if tokens > TOKENS_AT_ONCE and jax.default_backend() == "cpu":
        return _in_tiles(x, experts, weights, up, down)
    spread = jnp.zeros((tokens, total)).at[jnp.arange(tokens)[:, None], experts].set(weights)
    return (_together if tokens <= TOKENS_AT_ONCE else _in_turn)(x, spread, up, down)


def _picked(x, experts, weights, up, down):
    """The chosen experts alone; weights (tokens, k)."""
    hidden = mlp.relu2(einsum("td,tkdf->tkf", x, up[experts], out=jnp.float32)) * weights[..., None]
    return einsum("tkf,tkfd->td", hidden.astype(x.dtype), down[experts], out=jnp.float32)


def _together(x, weights, up, down):
    """All experts in one product; weights (tokens, E), 0 for those not chosen."""
    hidden = mlp.relu2(einsum("td,edf->etf", x, up))  # this order of letters lets the weights lie as they are
    hidden *= weights.T[..., None].astype(x.dtype)
    return einsum("etf,efd->td", hidden, down, out=jnp.float32)


def _in_turn(x, weights, up, down):
    """All experts, one after the other; weights (tokens, E)."""

    def add(total, expert):
        up, down, weight = expert
        out = einsum("tf,fd->td", mlp.relu2(einsum("td,df->tf", x, up)), down, out=jnp.float32)
        return total + weight[:, None] * out, None

    return jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), (up, down, weights.T))[0]


def _in_tiles(x, experts, weights, up, down):
    """The chosen experts alone, for many tokens: sorted by expert, in tiles of one expert each; weights (tokens, k)."""
    (tokens, chosen), total = experts.shape, up.shape[0]
    count = tokens * chosen // TILE + total  # as many as are needed when every expert's last tile is nearly empty
    expert, order = jax.lax.sort_key_val(experts.reshape(-1), jnp.arange(tokens * chosen))
    load = jnp.zeros(total, jnp.int32).at[expert].add(1)
    tiles = -(-load // TILE)
    ends = jnp.cumsum(tiles)
    place = (ends - tiles)[expert] * TILE + jnp.arange(tokens * chosen) - (jnp.cumsum(load) - load)[expert]
    owner = jnp.minimum(jnp.searchsorted(ends, jnp.arange(count), side="right"), total - 1)
    tiled = jnp.zeros((count * TILE, x.shape[1]), x.dtype).at[place].set(x[order // chosen], unique_indices=True)
    hidden = mlp.relu2(einsum("ntd,ndf->ntf", tiled.reshape(count, TILE, -1), up[owner]))
    out = einsum("ntf,nfd->ntd", hidden, down[owner], out=jnp.float32).reshape(count * TILE, -1)
    out = out[place] * weights.reshape(-1)[order][:, None]
    return jnp.zeros(x.shape, jnp.float32).at[order // chosen].add(out)


class MoE(nn.Module):
    """x (B, L, D), None, Span -> y (B, L, D), None or the experts' load."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, state: None, span: Span) -> tuple[jax.Array, ExpertLoad | None]:
        p = declare(self, describe(self.config), self.config)
        tokens = x.reshape(-1, x.shape[-1])
        experts, weights = route(tokens, p["router"], p["correction"], self.config)
        y = routed(tokens, experts, weights, p["up"], p["down"])
        y += mlp.mlp(tokens, p["shared_up"], p["shared_down"])
        load = None
        if span.count_experts:
            real = span.real(x.shape[1]).reshape(-1, 1).astype(jnp.int32)
            load = jnp.zeros(self.config.experts, jnp.int32).at[experts].add(real)
        return y.astype(x.dtype).reshape(x.shape), load

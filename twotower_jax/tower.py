"""The stack of layers: one definition, applied to either tower's parameters."""

import flax.linen as nn
import jax

from twotower_jax.config import ATTENTION, MAMBA, MLP, MOE, Config
from twotower_jax.layers import attention, mamba, mlp, moe
from twotower_jax.layers.embedding import embed
from twotower_jax.layers.norm import rms_norm
from twotower_jax.parameters import Parameter, declare, normal, prefixed
from twotower_jax.state import LayerState, Span, TowerState

MIXERS = {MAMBA: mamba.Mamba, ATTENTION: attention.Attention, MOE: moe.MoE, MLP: mlp.MLP}
DESCRIPTIONS = {MAMBA: mamba.describe, ATTENTION: attention.describe, MOE: moe.describe, MLP: mlp.describe}

NORM = {"norm": Parameter(("hidden",), "norm.weight")}


def describe(c: Config) -> dict:
    """The parameters of a tower, with Hugging Face names from the tower's prefix on."""
    layers = {
        f"layers_{i}": prefixed(f"layers.{i}.", NORM | {"mixer": prefixed("mixer.", DESCRIPTIONS[kind](c))})
        for i, kind in enumerate(c.pattern)
    }
    return {**_outer(c), **layers}


def _outer(c: Config) -> dict[str, Parameter]:
    return {
        "embeddings": Parameter(("vocab", "hidden"), "embeddings.weight", init=normal(c.initializer_range)),
        "norm_f": Parameter(("hidden",), "norm_f.weight"),
    }


class Layer(nn.Module):
    """x + gate * mixer(norm(x)), modulated before the norm in M and * layers, after it in E and - layers."""

    config: Config
    kind: str

    @nn.compact
    def __call__(
        self, x: jax.Array, state: LayerState, span: Span, modulation: jax.Array | None
    ) -> tuple[jax.Array, LayerState]:
        norm = declare(self, NORM, self.config)["norm"]
        mixer = MIXERS[self.kind](self.config, name="mixer")
        if modulation is None:
            y, state = mixer(rms_norm(x, norm, self.config.norm_eps), state, span)
            return x + y, state
        shift, scale, gate = (modulation[:, None, i] for i in range(3))
        if self.kind in (MAMBA, ATTENTION):
            y = rms_norm(x * (1 + scale) + shift, norm, self.config.norm_eps)
        else:
            y = rms_norm(x, norm, self.config.norm_eps) * (1 + scale) + shift
        y, state = mixer(y, state, span)
        return x + gate * y, state


class Tower(nn.Module):
    """Tokens to final hidden states, and the state after them.

    Call with tokens (B, L) int32, TowerState, Span and, for a conditioned denoiser, modulation (layers, B, 3, D).
    Returns the normed hidden states (B, L, D) and a TowerState that has read the span's real tokens. With `remat` a
    gradient computes each layer again instead of keeping what is inside it.
    """

    config: Config
    remat: bool = False

    @nn.compact
    def __call__(
        self, tokens: jax.Array, state: TowerState, span: Span, modulation: jax.Array | None = None
    ) -> tuple[jax.Array, TowerState]:
        p = declare(self, _outer(self.config), self.config)
        x = embed(p["embeddings"], tokens, self.config)
        layers = []
        for i, kind in enumerate(self.config.pattern):
            layer = (nn.remat(Layer) if self.remat else Layer)(self.config, kind, name=f"layers_{i}")
            x, after = layer(x, state.layers[i], span, None if modulation is None else modulation[i])
            layers.append(after)
        x = rms_norm(x, p["norm_f"], self.config.norm_eps)
        return x, TowerState(layers=tuple(layers), length=state.length + span.count, first=state.first)

"""The Mamba-2 mixer: projection, causal convolution, selective scan, gated norm."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from twotower_jax.config import Config
from twotower_jax.layers.collectives import tensor_index, tensor_sum
from twotower_jax.layers.linear import project
from twotower_jax.layers.norm import rms_norm
from twotower_jax.layers.ssm import chunk, packed_scan, selective_scan
from twotower_jax.parameters import Parameter, declare, linear, normal
from twotower_jax.state import MambaState, MambaTrace, Packing, Span


def describe(c: Config) -> dict[str, Parameter]:
    weights = normal(c.initializer_range)

    def a_log(key, shape, dtype=jnp.float32):
        return jnp.log(jnp.arange(1, shape[0] + 1, dtype=dtype))

    def dt_bias(key, shape, dtype=jnp.float32):
        """The inverse softplus of a dt drawn log-uniformly."""
        smallest, largest, floor = c.time_step_init
        low, high = jnp.log(smallest), jnp.log(largest)
        dt = jnp.maximum(jnp.exp(jax.random.uniform(key, shape, dtype, low, high)), floor)
        return dt + jnp.log(-jnp.expm1(-dt))

    description = {
        "in_proj": linear("hidden", "mamba_in", "in_proj.weight", weights),
        "conv_weight": Parameter(("conv_taps", "conv_channels"), "conv1d.weight", "conv", weights),
        "dt_bias": Parameter(("mamba_heads",), "dt_bias", init=dt_bias, dtype=jnp.float32),
        "a_log": Parameter(("mamba_heads",), "A_log", init=a_log, dtype=jnp.float32),
        "skip": Parameter(("mamba_heads",), "D", dtype=jnp.float32),
        "norm": Parameter(("mamba_inner",), "norm.weight"),
        "out_proj": linear("mamba_inner", "hidden", "out_proj.weight", weights),
    }
    if c.conv_bias:
        description["conv_bias"] = Parameter(("conv_channels",), "conv1d.bias", init=nn.initializers.zeros)
    return description


def causal_conv(x: jax.Array, tail: jax.Array, weight: jax.Array, bias: jax.Array | None, count: jax.Array):
    """Depthwise causal convolution, summed in float32.

    Args:
      x: (B, L, C) raw inputs.
      tail: (B, K - 1, C), the raw inputs before them.
      weight: (K, C), the newest tap last.
      bias: (C,) or None.
      count: (B,) int32, the real positions of x.

    Returns:
      (B, L, C) in float32, and the tail after the last real position.
    """
    length, taps = x.shape[1], weight.shape[0]
    inputs = jnp.concatenate([tail, x], axis=1)
    y = sum(inputs[:, k : k + length].astype(jnp.float32) * weight[k].astype(jnp.float32) for k in range(taps))
    if bias is not None:
        y += bias.astype(jnp.float32)
    newest = count[:, None] + jnp.arange(taps - 1)
    return y, jnp.take_along_axis(inputs, newest[..., None], axis=1)


def packed_conv(x: jax.Array, packing: Packing, weight: jax.Array, bias: jax.Array | None):
    """`causal_conv` over packed documents, each of which begins with zeros before it.

    Args:
      x: (B, L, C) raw inputs.
      packing: the documents.
      weight: (K, C).
      bias: (C,) or None.

    Returns:
      (B, L, C) in float32, and the tail before each of the blocks, (B, M, K - 1, C).
    """
    (rows, length), taps = x.shape[:2], weight.shape[0]
    inputs = jnp.pad(x, [(0, 0), (taps - 1, 0), (0, 0)])
    owner = jnp.pad(packing.segments, [(0, 0), (taps - 1, 0)])
    y = jnp.zeros(x.shape, jnp.float32) if bias is None else jnp.broadcast_to(bias.astype(jnp.float32), x.shape)
    for k in range(taps):
        own = owner[:, k : k + length] == packing.segments
        y += jnp.where(own[..., None], inputs[:, k : k + length].astype(jnp.float32), 0.0) * weight[k].astype(
            jnp.float32
        )
    row = jnp.arange(rows)[:, None]
    newest = packing.blocks[..., None] + jnp.arange(taps - 1)
    own = owner[row[..., None], newest] == packing.segments[row, packing.blocks][..., None]
    return y, jnp.where(own[..., None], inputs[row[..., None], newest], 0)


class Mamba(nn.Module):
    """x (B, L, D), MambaState, Span -> y (B, L, D), MambaState or MambaTrace. Causal, whatever the span says."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, state: MambaState, span: Span) -> tuple[jax.Array, MambaState | MambaTrace]:
        c, p = self.config, declare(self, describe(self.config), self.config)
        rows, length = x.shape[:2]
        parts = [c.mamba_width, c.mamba_width + c.conv_channels]
        z, xbc, dt = jnp.split(project(x, p["in_proj"]), parts, axis=-1)
        raw = xbc
        if span.packing is None:
            xbc, tail = causal_conv(xbc, state.conv, p["conv_weight"], p.get("conv_bias"), span.count)
        else:
            xbc, tail = packed_conv(xbc, span.packing, p["conv_weight"], p.get("conv_bias"))
        real = span.real(length)[..., None]
        xbc = jnp.where(real, nn.silu(xbc), 0.0)  # a value at padding that is not finite would outlive dt = 0
        values, b, keys = jnp.split(xbc, [c.mamba_width, c.mamba_width + c.mamba_groups * c.state_size], axis=-1)
        values = values.reshape(rows, length, c.mamba_heads, c.mamba_head_dim)
        b, keys = (z_.reshape(rows, length, c.mamba_groups, c.state_size) for z_ in (b, keys))
        dt = jnp.clip(jax.nn.softplus(dt.astype(jnp.float32) + p["dt_bias"]), *c.time_step_limit)
        dt = jnp.where(real, dt, 0.0)
        a = -jnp.exp(p["a_log"])
        if span.packing is None:
            y, ssm = selective_scan(values, dt, a, b, keys, state.ssm, c.chunk_size)
        else:
            y, ssm = _scan_documents(values, dt, a, b, keys, span.packing)
        y = (y + p["skip"][:, None] * values).reshape(rows, length, c.mamba_width)
        gated = y * nn.silu(z.astype(jnp.float32))
        y = rms_norm(gated, p["norm"], c.norm_eps, c.mamba_groups, lambda means: _of_groups(means, c)).astype(x.dtype)
        y = tensor_sum(project(y, p["out_proj"], out=jnp.float32), c).astype(x.dtype)
        if span.trace:
            inputs = jnp.concatenate([state.conv, raw], axis=1)
            return y, MambaTrace(inputs=inputs, weighted=dt[..., None] * values, decay=dt * a, b=b)
        if span.packing is not None:
            tail, ssm = (z_.reshape(-1, *z_.shape[2:]) for z_ in (tail, ssm))
        return y, MambaState(conv=tail, ssm=ssm)


def settle(state: MambaState, trace: MambaTrace, count: jax.Array) -> MambaState:
    """The state after `count` (B,) of the positions of a trace that begins at a state: beyond them dt = 0."""
    length, tail = trace.decay.shape[1], state.conv.shape[1]
    real = jnp.arange(length) < count[:, None]
    newest = count[:, None] + jnp.arange(tail)
    weighted = jnp.where(real[..., None, None], trace.weighted, 0)
    decay = jnp.where(real[..., None], trace.decay, 0)
    _, ssm = chunk(weighted, decay, trace.b, trace.b, state.ssm)
    return MambaState(conv=jnp.take_along_axis(trace.inputs, newest[..., None], axis=1), ssm=ssm)


def _of_groups(means: jax.Array, c: Config) -> jax.Array:
    """The groups' means for each of a device's runs of heads (..., G), some of which are parts of a group."""
    shards, runs = c.shards.tensor, c.mamba_groups
    if shards == 1 or c.whole.mamba_groups == shards * runs:
        return means
    groups = c.whole.mamba_groups
    own = (tensor_index(c) * runs + jnp.arange(runs)) * groups // (runs * shards)
    sums = jnp.zeros((*means.shape[:-1], groups), jnp.float32).at[..., own].add(means)
    return (tensor_sum(sums, c) * (groups / (runs * shards)))[..., own]


def _scan_documents(x, dt, a, b, c, packing: Packing):
    """`packed_scan`, and the state before each of the blocks, (B, M, H, P, N): zeros where its document begins."""
    segments, blocks, size = packing.segments, packing.blocks, packing.block_size
    previous = jnp.pad(segments, [(0, 0), (1, 0)])[:, :-1]
    y, before = packed_scan(x, dt, a, b, c, (segments > 0) & (segments != previous), size)
    row = jnp.arange(x.shape[0])[:, None]
    inside = previous[row, blocks] == segments[row, blocks]
    return y, jnp.where(inside[..., None, None, None], before[row, blocks // size], 0.0)

"""Grouped-query attention over [cache | new positions], causal or open within the new; no positions are encoded."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from twotower_jax.config import Config
from twotower_jax.layers.collectives import tensor_sum
from twotower_jax.layers.linear import apart, einsum, project
from twotower_jax.parameters import Parameter, declare, linear, normal
from twotower_jax.state import KVCache, Span

MAX_SCORES = 2**26  # float32 scores held at once (256 MiB); more queries are mapped over in pieces


def describe(c: Config) -> dict[str, Parameter]:
    weights = normal(c.initializer_range)
    return {
        "query": linear("hidden", "query", "q_proj.weight", weights),
        "key": linear("hidden", "kv", "k_proj.weight", weights),
        "value": linear("hidden", "kv", "v_proj.weight", weights),
        "out": linear("query", "hidden", "o_proj.weight", weights),
    }


def attend(query: jax.Array, key: jax.Array, value: jax.Array, cache: KVCache, span: Span) -> jax.Array:
    """Softmax attention of new positions over the cache and each other, in float32 between the products.

    Args:
      query: (B, L, H, P).
      key: (B, L, J, P), of the new positions.
      value: (B, L, J, P).
      cache: the positions before, of which each row uses those up to `span.start`; with fewer rows than B, each is
        shared by as many rows in a sequence.
      span: the new positions.

    Returns:
      (B, L, H, P). Undefined, but finite, at padding.
    """
    rows, length, heads, width = query.shape
    caches, groups, capacity = cache.key.shape[:3]
    chex.assert_shape([key, value], (rows, length, groups, width))
    chex.assert_shape([cache.key, cache.value], (caches, groups, capacity, width))
    if rows > caches:
        return _attend_shared(query, key, value, cache, span)
    query = query.reshape(rows, length, groups, heads // groups, width)
    cached = jnp.arange(capacity) < span.start[:, None]
    if span.first is not None:
        cached &= jnp.arange(capacity) >= span.first[:, None]
    real = span.real(length)

    def masked(scores, visible):
        # A finite floor: a row of padding sees nothing, and its softmax must stay finite.
        return jnp.where(visible[:, None, None], scores * width**-0.5, jnp.finfo(jnp.float32).min)

    def one(query, position):
        """query (B, J, R, P) at one position; batched over positions by `vmap`."""
        seen = real & (jnp.arange(length) <= position) if span.causal else real
        if span.packing is not None:
            seen &= span.packing.segments == span.packing.segments[:, position, None]
        old = masked(einsum("bjrp,bjtp->bjrt", query, cache.key, out=jnp.float32), cached)
        new = masked(einsum("bjrp,bsjp->bjrs", apart(query), key, out=jnp.float32), seen)
        top = jnp.maximum(old.max(-1), new.max(-1))[..., None]
        old, new = jnp.exp(old - top), jnp.exp(new - top)
        total = (old.sum(-1) + new.sum(-1))[..., None]
        out = einsum("bjrt,bjtp->bjrp", old.astype(value.dtype), cache.value, out=jnp.float32)
        out += einsum("bjrs,bsjp->bjrp", new.astype(value.dtype), value, out=jnp.float32)
        return (out / total).astype(value.dtype)

    queries = jnp.moveaxis(query, 1, 0), jnp.arange(length)
    piece = max(1, MAX_SCORES // (rows * heads * (capacity + length)))
    piece = 1 << (piece.bit_length() - 1)  # divides the usual lengths: a remainder would be compiled once more
    out = jax.vmap(one)(*queries) if piece >= length else jax.lax.map(lambda q: one(*q), queries, batch_size=piece)
    return jnp.moveaxis(out, 0, 1).reshape(rows, length, heads, width)


def _attend_shared(query, key, value, cache, span):
    """M rows in a sequence share each row of the cache, which is not copied for them."""
    caches = cache.key.shape[0]

    def split(z):
        return jnp.moveaxis(z.reshape(caches, -1, *z.shape[1:]), 1, 0)

    arrays = jax.tree.map(split, (query, key, value, span))
    size = query[0].size // query.shape[-1] * (cache.key.shape[2] + query.shape[1]) * caches  # scores of one of the M
    together = max(1, MAX_SCORES // size)
    out = jax.lax.map(lambda z: attend(*z[:3], cache, z[3]), arrays, batch_size=together)
    return jnp.moveaxis(out, 0, 1).reshape(query.shape)


def append(cache: KVCache, key: jax.Array, value: jax.Array, span: Span) -> KVCache:
    """The cache with the real new positions written after each row's own; padding is not written."""
    offsets = jnp.arange(key.shape[1])
    positions = jnp.where(offsets < span.count[:, None], span.start[:, None] + offsets, cache.key.shape[2])
    rows = jnp.arange(key.shape[0])[:, None]
    return KVCache(
        key=cache.key.at[rows, :, positions].set(key, mode="drop"),
        value=cache.value.at[rows, :, positions].set(value, mode="drop"),
    )


class Attention(nn.Module):
    """x (B, L, D), KVCache, Span -> y (B, L, D), KVCache."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, state: KVCache, span: Span) -> tuple[jax.Array, KVCache]:
        c, p = self.config, declare(self, describe(self.config), self.config)

        heads = {"query": c.attention_heads, "key": c.kv_heads, "value": c.kv_heads}
        query, key, value = (
            project(x, p[name]).reshape(*x.shape[:2], count, c.head_dim) for name, count in heads.items()
        )
        y = attend(query, key, value, state, span).reshape(*x.shape[:2], -1)
        if span.packing is None:
            state = append(state, key, value, span)
        else:
            state = KVCache(key=key.swapaxes(1, 2), value=value.swapaxes(1, 2))
        return tensor_sum(project(y, p["out"], out=jnp.float32), c).astype(x.dtype), state

"""The selective scan of Mamba-2: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t.

Everything is float32. A position with dt = 0 leaves the state as it is, so padding is exact.
"""

import chex
import jax
import jax.numpy as jnp

from twotower_jax.layers.linear import apart, einsum


def step(x, decay, b, c, state):
    """One position. x (B, H, P) times dt, decay dt a (B, H), b and c (B, G, N), state (B, H, P, N) -> y, new state."""
    heads, groups = x.shape[1], b.shape[1]
    b, c = (jnp.repeat(z, heads // groups, axis=1) for z in (b, c))
    state = jnp.exp(decay)[..., None, None] * state + x[..., None] * b[:, :, None]
    return einsum("bhpn,bhn->bhp", state, c), state


def chunk(x, decay, b, c, state):
    """Q positions by matrix products alone (Mamba-2, arXiv 2405.21060, section 6).

    x (B, Q, H, P) times dt, decay dt a (B, Q, H), b and c (B, Q, G, N), state (B, H, P, N) -> y, new state.
    """
    rows, length, heads, width = x.shape
    groups = b.shape[2]
    split = (rows, length, groups, heads // groups)  # heads of a group share b and c; r runs over them
    decay = decay.reshape(split)  # its log, at each position
    weighted = x.reshape(*split, width)
    grouped = state.reshape(rows, groups, heads // groups, width, -1)

    # Log of the decay from position s to q, summed for each s by itself: a difference of sums from the chunk's start
    # would lose the digits that a near pair needs.
    order = jnp.arange(length)[:, None] - jnp.arange(length)
    order = order[None, :, :, None, None]
    since = jnp.cumsum(jnp.where(order > 0, decay[:, :, None], 0.0), axis=1)
    since = jnp.where(order >= 0, since, -jnp.inf)
    scores = einsum("bqgn,bsgn->bqsg", c, b)[..., None] * jnp.exp(since)
    y = einsum("bqsgr,bsgrp->bqgrp", scores, weighted)
    total = jnp.exp(jnp.cumsum(decay, axis=1))  # from the chunk's start
    y += einsum("bqgn,bgrpn->bqgrp", apart(c), grouped) * total[..., None]

    grouped = grouped * total[:, -1, ..., None, None]
    grouped += einsum("bsgrp,bsgn->bgrpn", weighted * jnp.exp(since[:, -1])[..., None], b)
    return y.reshape(x.shape), grouped.reshape(state.shape)


def selective_scan(x, dt, a, b, c, state, chunk_size):
    """Any number of positions: `step` for one, one `chunk` for a block, `lax.scan` over chunks beyond.

    Args:
      x: (B, L, H, P) float32.
      dt: (B, L, H) float32, 0 at padding.
      a: (H,) float32, negative.
      b: (B, L, G, N) float32; heads H / G at a time share it.
      c: (B, L, G, N) float32.
      state: (B, H, P, N) float32, the state before the first position.
      chunk_size: positions a chunk; any value gives the same result.

    Returns:
      y (B, L, H, P) and the state after the last position, float32.
    """
    length = x.shape[1]
    x, decay = _weighted(x, dt, a, b, c, state)
    if length == 1:
        y, state = step(x[:, 0], decay[:, 0], b[:, 0], c[:, 0], state)
        return y[:, None], state
    if length <= chunk_size:
        return chunk(x, decay, b, c, state)
    y, state, _ = _scan(x, decay, b, c, state, chunk_size, keep=False)
    return y, state


def packed_scan(x, dt, a, b, c, restart, chunk_size):
    """The scan over packed documents, and the states within.

    Args:
      x, dt, a, b, c: as for `selective_scan`.
      restart: (B, L) bool, positions that forget what was before them.
      chunk_size: Q, of which the states are wanted; must divide L.

    Returns:
      y (B, L, H, P) and the states before each chunk (B, L / Q, H, P, N), float32.
    """
    rows, length, heads, width = x.shape
    if length % chunk_size:
        raise ValueError(f"a row of {length} positions has no whole number of chunks of {chunk_size}")
    state = jnp.zeros((rows, heads, width, b.shape[-1]), jnp.float32)
    x, decay = _weighted(x, dt, a, b, c, state)
    decay = jnp.where(restart[..., None], -jnp.inf, decay)
    y, _, before = _scan(x, decay, b, c, state, chunk_size, keep=True)
    return y, jnp.moveaxis(before, 0, 1)


def _weighted(x, dt, a, b, c, state):
    """dt x and the log of the decay, dt a, of arguments that fit each other."""
    rows, length, heads, width = x.shape
    chex.assert_shape(dt, (rows, length, heads))  # where a wrong shape would broadcast
    chex.assert_shape(a, (heads,))
    chex.assert_equal_shape([b, c])
    chex.assert_shape(state, (rows, heads, width, b.shape[-1]))
    return dt[..., None] * x, dt * a


def _scan(x, decay, b, c, state, chunk_size, *, keep):
    """`chunk` after `chunk` -> y (B, L, H, P), the state after, and if kept those before each, (chunks, B, H, P, N)."""
    rows, length = x.shape[:2]
    chunks = -(-length // chunk_size)

    def split(z):
        z = jnp.pad(z, [(0, 0), (0, chunks * chunk_size - length)] + [(0, 0)] * (z.ndim - 2))
        return jnp.moveaxis(z.reshape(rows, chunks, chunk_size, *z.shape[2:]), 1, 0)

    def body(state, inputs):
        y, after = chunk(*inputs, state)
        return after, (y, state if keep else None)

    state, (y, before) = jax.lax.scan(body, state, jax.tree.map(split, (x, decay, b, c)))
    return jnp.moveaxis(y, 0, 1).reshape(rows, -1, *x.shape[2:])[:, :length], state, before

"""The selective scan of Mamba-2: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t.

Everything is float32. A position with dt = 0 leaves the state as it is, so padding is exact.
"""

import chex
import jax
import jax.numpy as jnp

from twotower_jax.layers.linear import apart, einsum


def step(x, dt, a, b, c, state):
    """One position. x (B, H, P), dt (B, H), a (H,), b and c (B, G, N), state (B, H, P, N) -> y (B, H, P), new state."""
    heads, groups = x.shape[1], b.shape[1]
    b, c = (jnp.repeat(z, heads // groups, axis=1) for z in (b, c))
    state = jnp.exp(dt * a)[..., None, None] * state + (dt[..., None] * x)[..., None] * b[:, :, None]
    return einsum("bhpn,bhn->bhp", state, c), state


def chunk(x, dt, a, b, c, state):
    """Q positions by matrix products alone (Mamba-2, arXiv 2405.21060, section 6).

    x (B, Q, H, P), dt (B, Q, H), a (H,), b and c (B, Q, G, N), state (B, H, P, N) -> y (B, Q, H, P), new state.
    """
    rows, length, heads, width = x.shape
    groups = b.shape[2]
    split = (rows, length, groups, heads // groups)  # heads of a group share b and c; r runs over them
    decay = (dt * a).reshape(split)  # its log, at each position
    weighted = (dt[..., None] * x).reshape(*split, width)
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
    rows, length, heads, width = x.shape
    chex.assert_shape(dt, (rows, length, heads))  # where a wrong shape would broadcast
    chex.assert_shape(a, (heads,))
    chex.assert_equal_shape([b, c])
    chex.assert_shape(state, (rows, heads, width, b.shape[-1]))
    if length == 1:
        y, state = step(x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], state)
        return y[:, None], state
    if length <= chunk_size:
        return chunk(x, dt, a, b, c, state)

    chunks = -(-length // chunk_size)

    def split(z):
        z = jnp.pad(z, [(0, 0), (0, chunks * chunk_size - length)] + [(0, 0)] * (z.ndim - 2))
        return jnp.moveaxis(z.reshape(rows, chunks, chunk_size, *z.shape[2:]), 1, 0)

    def body(state, inputs):
        x, dt, b, c = inputs
        y, state = chunk(x, dt, a, b, c, state)
        return state, y

    state, y = jax.lax.scan(body, state, jax.tree.map(split, (x, dt, b, c)))
    return jnp.moveaxis(y, 0, 1).reshape(rows, -1, *x.shape[2:])[:, :length], state

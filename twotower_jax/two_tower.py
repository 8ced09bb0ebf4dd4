"""Both towers and their heads: what a decoder may ask of the model.

Parameters are {"context": {"tower", "head"}, "denoiser": {"tower", "head", "time"}}; a backbone has "context" alone.
All functions are pure and may stand inside `jit`, `while_loop` and `scan`.
"""

import jax
import jax.numpy as jnp

from twotower_jax import tower
from twotower_jax.config import Config
from twotower_jax.layers import attention, mamba, time_conditioning
from twotower_jax.layers.linear import project
from twotower_jax.layers.time_conditioning import TimeConditioning
from twotower_jax.parameters import linear, normal, prefixed
from twotower_jax.state import KVCache, MambaState, MambaTrace, Packing, Span, TowerState, empty_state
from twotower_jax.tower import Tower

PREFILL_TOKENS = 1024  # of all rows, that one pass of the context tower reads: longer prompts need no more memory


def describe(c: Config, two_towers: bool) -> dict:
    """The description of every parameter of a TwoTower or of a backbone, with NVIDIA's names."""

    def one(prefix: str, head: str) -> dict:
        return {
            "tower": prefixed(prefix, tower.describe(c)),
            "head": linear("hidden", "vocab", head, normal(c.initializer_range)),
        }

    if not two_towers:
        return {"context": one("backbone.", "lm_head.weight")}
    return {
        "context": one("context_tower.", "context_lm_head.weight"),
        "denoiser": one("denoiser_tower.", "lm_head.weight") | {"time": time_conditioning.describe(c)},
    }


def dtype_of(params: dict) -> jnp.dtype:
    """The dtype of the activations of the model, or of the tower that is there."""
    return next(iter(params.values()))["tower"]["embeddings"].dtype


def context_head(params: dict, hidden: jax.Array) -> jax.Array:
    """hidden (..., D) of the context tower -> logits (..., V) float32."""
    with jax.named_scope("context_head"):
        return project(hidden, params["context"]["head"], out=jnp.float32)


def extend(
    config: Config, params: dict, state: TowerState, tokens: jax.Array, count: jax.Array
) -> tuple[jax.Array, TowerState]:
    """The context tower reads more tokens: a prompt's piece, a finished block (the commit), or one token.

    Args:
      config: dimensions.
      params: parameters.
      state: what each row has read.
      tokens: (B, L) int32.
      count: (B,) int32, how many of the L tokens are real; with 0 a row stays as it is.

    Returns:
      hidden states (B, L, D) and the state after.
    """
    with jax.named_scope("context_tower"):
        span = Span(start=state.length, count=count, first=state.first)
        return Tower(config).apply({"params": params["context"]["tower"]}, tokens, state, span)


def probe(
    config: Config, params: dict, state: TowerState, tokens: jax.Array, count: jax.Array
) -> tuple[jax.Array, TowerState]:
    """`extend`, for `settle` to decide afterwards how many of the tokens were read.

    Returns:
      hidden states (B, L, D), and what `settle` needs.
    """
    with jax.named_scope("context_tower"):
        span = Span(start=state.length, count=count, first=state.first, trace=True)
        return Tower(config).apply({"params": params["context"]["tower"]}, tokens, state, span)


def settle(state: TowerState, probed: TowerState, count: jax.Array) -> TowerState:
    """The state after `count` (B,) of the tokens of a `probe` of it, without another pass."""
    with jax.named_scope("settle"):

        def one(old, new):
            return mamba.settle(old, new, count) if isinstance(new, MambaTrace) else new

        return state.replace(layers=tuple(map(one, state.layers, probed.layers)), length=state.length + count)


def read_packed(
    config: Config, tower: dict, tokens: jax.Array, packing: Packing, remat: bool = False
) -> tuple[jax.Array, TowerState]:
    """A tower reads rows of packed documents in one causal pass, as in training.

    Args:
      config: dimensions.
      tower: parameters of one tower.
      tokens: (B, L) int32, L a multiple of the block size.
      packing: the documents, and the M blocks of each row before which the state is wanted.
      remat: spend less memory on a gradient, and more time.

    Returns:
      hidden states (B, L, D); and the state before each block, as `denoise` takes it for B M rows of one block, with
      the experts' loads (E,) at their layers.
    """
    with jax.named_scope("read_packed"):
        rows = tokens.shape[0]
        none = jnp.zeros(rows, jnp.int32)
        span = Span(start=none, count=none, packing=packing, count_experts=True)
        dtype = tower["embeddings"].dtype
        hidden, state = Tower(config, remat).apply({"params": tower}, tokens, empty_state(config, rows, 1, dtype), span)
        row = jnp.arange(rows)[:, None]
        own = packing.segments[row, packing.blocks][..., None] == packing.segments[:, None]
        first = jnp.argmax(own, axis=-1).astype(jnp.int32)
        return hidden, TowerState(state.layers, packing.blocks.reshape(-1), first.reshape(-1))


def advance(
    config: Config, tower: dict, state: TowerState, tokens: jax.Array, count: jax.Array, remat: bool = False
) -> TowerState:
    """The state `count` tokens after the beginnings of packed blocks, of which `read_packed` gives the state.

    Args:
      config: dimensions.
      tower: the context tower's parameters.
      state: before the blocks; its caches hold all of their rows' keys and values.
      tokens: (B M, S) int32, the blocks.
      count: (B M,) int32, from 0 to S.
      remat: spend less memory, and more time.
    """
    span = Span(state.length, count, first=state.first)
    _, after = Tower(config, remat).apply({"params": tower}, tokens, state, span)
    layers = [new if isinstance(new, MambaState) else old for new, old in zip(after.layers, state.layers, strict=True)]
    return TowerState(tuple(layers), state.length + count, state.first)


def _chunks(tokens: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """tokens (B, L) and count (B,) as chunks (n, B, chunk) and each chunk's counts (n, B)."""
    rows, length = tokens.shape
    share = max(16, PREFILL_TOKENS // rows)
    size = min(length, 1 << (share.bit_length() - 1))
    tokens = jnp.pad(tokens, ((0, 0), (0, -length % size))).reshape(rows, -1, size).swapaxes(0, 1)
    starts = jnp.arange(tokens.shape[0])[:, None] * size
    return tokens, jnp.clip(count - starts, 0, size)


def prefill(
    config: Config, params: dict, tokens: jax.Array, count: jax.Array, capacity: int
) -> tuple[jax.Array, TowerState]:
    """The context tower reads the prompts: in one pass up to `PREFILL_TOKENS`, in a scan over such passes beyond.

    Args:
      config: dimensions.
      params: parameters.
      tokens: (B, L) int32, padded on the right.
      count: (B,) int32, the prompts' lengths, 0 or more.
      capacity: tokens that the state has room for.

    Returns:
      the hidden state of each row's last token (B, D), zeros where there is none, and the state after the prompts.
    """
    rows = tokens.shape[0]
    # The barrier keeps the compiler from computing attention over the known zeros, slowly, at compile time.
    state = jax.lax.optimization_barrier(empty_state(config, rows, capacity, dtype_of(params)))
    last = jnp.zeros((rows, config.hidden_size), dtype_of(params))

    def read(carry, chunk):
        state, last = carry
        tokens, count = chunk
        hidden, state = extend(config, params, state, tokens, count)
        newest = jnp.take_along_axis(hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
        return (state, jnp.where(count[:, None] > 0, newest, last)), None

    with jax.named_scope("prefill"):
        (state, last), _ = jax.lax.scan(read, (state, last), _chunks(tokens, count))
    return last, state


def news(state: TowerState, before: jax.Array, size: int) -> TowerState:
    """What has changed in a state since its rows had the length `before` (B,), at most `size` tokens ago: the caches'
    new positions, the Mamba states and the length.
    """
    with jax.named_scope("news"):
        positions = before[:, None, None, None] + jnp.arange(size)[:, None]

        def since(cache: jax.Array) -> jax.Array:
            return jnp.take_along_axis(cache, positions, axis=2, mode="clip")

        layers = (KVCache(since(x.key), since(x.value)) if isinstance(x, KVCache) else x for x in state.layers)
        return state.replace(layers=tuple(layers))


def absorb(state: TowerState, changed: TowerState, rows: jax.Array) -> TowerState:
    """A state, or a denoiser's copy of it, with the `news` of some rows (n,); a number beyond the last is for none."""
    with jax.named_scope("absorb"):

        def put(into: jax.Array, new: jax.Array) -> jax.Array:
            return into.at[rows].set(new, mode="drop")

        length = put(state.length, changed.length)
        span = Span(state.length, length - state.length)

        def one(old, new):
            if not isinstance(old, KVCache):
                return jax.tree.map(put, old, new)
            told = (x.swapaxes(1, 2) for x in (new.key, new.value))
            key, value = (put(jnp.zeros((len(length), *x.shape[1:]), x.dtype), x) for x in told)
            return attention.append(old, key, value, span)

        return state.replace(layers=tuple(map(one, state.layers, changed.layers)), length=length)


def context_logits(config: Config, params: dict, tokens: jax.Array, count: jax.Array, capacity: int) -> jax.Array:
    """The context tower's logits at every position: tokens (B, L), count (B,) -> (B, L, V) float32."""
    state = jax.lax.optimization_barrier(empty_state(config, tokens.shape[0], capacity, dtype_of(params)))  # as above

    def read(state, chunk):
        hidden, state = extend(config, params, state, *chunk)
        return state, context_head(params, hidden)

    _, logits = jax.lax.scan(read, state, _chunks(tokens, count))
    return logits.swapaxes(0, 1).reshape(tokens.shape[0], -1, config.vocab_size)[:, : tokens.shape[1]]


def denoise(
    config: Config,
    params: dict,
    state: TowerState,
    block: jax.Array,
    t: jax.Array | None,
    size: jax.Array | None = None,
) -> jax.Array:
    """One pass of the denoiser over a block, which sees the whole context and itself; nothing is kept.

    Args:
      config: dimensions.
      params: parameters.
      state: the context tower's, read-only.
      block: (B, S) int32, masked positions holding the mask id.
      t: (B,) masked share of each row's block, or None for no time conditioning (mock-AR).
      size: (B,) positions of each row's block, if it is shorter than S; the others see each other as if it ended there.

    Returns:
      logits (B, S, V) float32; at padding without meaning.
    """
    hidden, _ = denoiser_hidden(config, params["denoiser"], state, block, t, size=size)
    with jax.named_scope("denoiser_head"):
        return project(hidden, params["denoiser"]["head"], out=jnp.float32)


def denoiser_hidden(
    config: Config,
    denoiser: dict,
    state: TowerState,
    block: jax.Array,
    t: jax.Array | None,
    causal: bool = False,
    count_experts: bool = False,
    remat: bool = False,
    size: jax.Array | None = None,
) -> tuple[jax.Array, TowerState]:
    """`denoise` before its head: hidden states (B, S, D), and what the tower's layers return as their state."""
    with jax.named_scope("denoiser_tower"):
        modulation = None if t is None else TimeConditioning(config).apply({"params": denoiser["time"]}, t)
        count = jnp.full_like(state.length, block.shape[1]) if size is None else size
        span = Span(state.length, count, causal, state.first, count_experts=count_experts)
        return Tower(config, remat).apply({"params": denoiser["tower"]}, block, state, span, modulation)

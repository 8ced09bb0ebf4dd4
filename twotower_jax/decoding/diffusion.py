"""Mask diffusion: a block of masks, refined by the denoiser until none is left, then read by the context tower."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from twotower_jax import two_tower
from twotower_jax.config import Config
from twotower_jax.decoding.sampling import Sampler, position_keys, row_keys
from twotower_jax.decoding.stopping import broken, holds
from twotower_jax.decoding.unmasking import ThresholdUnmasking
from twotower_jax.state import TowerState


@struct.dataclass
class Diffusion:
    """The rules of a run.

    Attributes:
      sampler: how a token is predicted.
      unmasking: which predictions are committed.
      mask_id: the token that stands for a masked position; it is never predicted.
      block_size: S.
    """

    sampler: Sampler
    unmasking: ThresholdUnmasking
    mask_id: int
    block_size: int = struct.field(pytree_node=False)


@struct.dataclass
class Block:
    """A block being denoised; each row has its own pace.

    Attributes:
      tokens: (B, S) int32, the mask id where masked.
      masked: (B, S) bool; all False in a row that is finished.
      step: (B,) int32, denoiser passes that the row has used.
      failed: (B,) bool, a logit was not finite.
    """

    tokens: jax.Array
    masked: jax.Array
    step: jax.Array
    failed: jax.Array


def masked_block(rules: Diffusion, active: jax.Array) -> Block:
    """A block in which every position of the active (B,) rows is masked."""
    shape = (active.shape[0], rules.block_size)
    return Block(
        tokens=jnp.full(shape, rules.mask_id, jnp.int32),
        masked=jnp.broadcast_to(active[:, None], shape),
        step=jnp.zeros(shape[0], jnp.int32),
        failed=jnp.zeros(shape[0], bool),
    )


def denoise_step(
    config: Config, params: dict, rules: Diffusion, state: TowerState, block: Block, keys: jax.Array
) -> Block:
    """One denoiser pass, and the commit of what it is sure of.

    Args:
      config: dimensions.
      params: parameters of both towers.
      rules: how to predict and what to commit.
      state: the context before the block.
      block: the block so far; rows without masks pass through unchanged.
      keys: (B, S), used above temperature 0.
    """
    with jax.named_scope("denoise_step"):
        active = block.masked.any(-1)
        t = block.masked.sum(-1) / rules.block_size
        logits = two_tower.denoise(config, params, state, block.tokens, t)
        failed = active & broken(logits)
        logits = jnp.where(jnp.arange(config.vocab_size) == rules.mask_id, -jnp.inf, logits)
        predicted = rules.sampler.predict(logits, keys)
        chosen = jnp.take_along_axis(logits, predicted[..., None], axis=-1)[..., 0]
        confidence = jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))
        commit = rules.unmasking.choose(confidence, block.masked, block.step) & ~failed[:, None]
        return Block(
            tokens=jnp.where(commit, predicted, block.tokens),
            masked=block.masked & ~commit & ~failed[:, None],
            step=block.step + active,
            failed=block.failed | failed,
        )


def denoise_block(
    config: Config, params: dict, rules: Diffusion, state: TowerState, block: Block, keys: jax.Array
) -> Block:
    """`denoise_step` until nothing is masked."""
    return jax.lax.while_loop(
        lambda block: block.masked.any(),
        lambda block: denoise_step(config, params, rules, state, block, keys),
        block,
    )


def _when(condition: jax.Array, change: Callable, value: Any) -> Any:
    """`change(value)` if the condition holds: a loop of one turn or none, which works in place where `cond` copies."""
    return jax.lax.while_loop(lambda c: c[0], lambda c: (jnp.array(False), change(c[1])), (condition, value))[1]


@struct.dataclass
class Progress:
    """Rows between two blocks: tokens (B, n), of which `length` (B,) count; `block` is the number of blocks done."""

    state: TowerState
    tokens: jax.Array
    block: jax.Array
    length: jax.Array
    forwards: jax.Array
    done: jax.Array
    failed: jax.Array


def generate(
    config: Config,
    params: dict,
    rules: Diffusion,
    prompts: jax.Array,
    count: jax.Array,
    rows: jax.Array,
    seed: jax.Array,
    eos: jax.Array,
    blocks: jax.Array,
    *,
    capacity: int,
    max_blocks: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Block after block, until every row's has ended or `blocks` are done.

    Args:
      config: dimensions.
      params: parameters of both towers.
      rules: the rules.
      prompts: (B, L) int32, padded on the right.
      count: (B,) int32, the prompts' lengths.
      rows: (B,) int32, numbers that the rows' random keys come from.
      seed: () uint32.
      eos: (n,) int32, ids that end a row after their block.
      blocks: () int32, at most `max_blocks`.
      capacity: tokens that the context's state has room for.
      max_blocks: blocks that the result has room for.

    Returns:
      tokens (B, max_blocks S), how many of them count (B,), denoiser passes (B,), whether a logit was not finite (B,).
    """
    size = rules.block_size
    batch = prompts.shape[0]
    keys = row_keys(seed, rows)
    _, state = two_tower.prefill(config, params, prompts, count, capacity)

    def one_block(p: Progress) -> Progress:
        positions = p.state.length[:, None] + jnp.arange(size)
        block = masked_block(rules, active=~p.done)
        block = denoise_block(config, params, rules, p.state, block, position_keys(keys, positions))
        finished = ~p.done & ~block.failed
        done = p.done | block.failed | holds(block.tokens, eos)

        def commit(state: TowerState) -> TowerState:
            with jax.named_scope("commit"):
                return two_tower.extend(config, params, state, block.tokens, jnp.where(done, 0, size))[1]

        more = (p.block + 1 < blocks) & ~done.all()
        return Progress(
            state=_when(more, commit, p.state),
            tokens=jax.lax.dynamic_update_slice(p.tokens, block.tokens, (0, p.block * size)),
            block=p.block + 1,
            length=p.length + jnp.where(finished, size, 0),
            forwards=p.forwards + block.step,
            done=done,
            failed=p.failed | block.failed,
        )

    none, no = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool)
    progress = Progress(
        state=state,
        tokens=jnp.zeros((batch, max_blocks * size), jnp.int32),
        block=jnp.zeros((), jnp.int32),
        length=none,
        forwards=none,
        done=no,
        failed=no,
    )
    p = jax.lax.while_loop(lambda p: (p.block < blocks) & ~p.done.all(), one_block, progress)
    return p.tokens, p.length, p.forwards, p.failed

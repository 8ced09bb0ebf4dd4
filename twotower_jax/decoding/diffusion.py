"""Mask diffusion: a block of masks, refined by the denoiser until none is left, then read by the context tower."""

import jax
import jax.numpy as jnp
from flax import struct

from twotower_jax import two_tower
from twotower_jax.config import Config
from twotower_jax.decoding.block import Block
from twotower_jax.decoding.drafting import Drafting
from twotower_jax.decoding.sampling import Sampler
from twotower_jax.decoding.unmasking import Seen, Unmasking
from twotower_jax.decoding.vocabulary import ONE_DEVICE, Vocabulary
from twotower_jax.state import TowerState


@struct.dataclass
class Diffusion:
    """The rules of a block.

    Attributes:
      sampler: how a token is predicted.
      unmasking: which predictions are committed, and which commits are taken back.
      mask_id: the token that stands for a masked position; it is never predicted.
    """

    sampler: Sampler
    unmasking: Unmasking | Drafting
    mask_id: int


def denoise_step(
    config: Config, params: dict, rules: Diffusion, state: TowerState, block: Block, keys: jax.Array
) -> Block:
    """One denoiser pass, and what it commits.

    Args:
      config: dimensions.
      params: parameters of both towers.
      rules: how to predict and what to commit.
      state: the context before the block.
      block: the block so far; rows without masks pass through unchanged.
      keys: (B, S), used above temperature 0.
    """
    with jax.named_scope("denoise_step"):
        t = block.masked.sum(-1) / block.size
        size = jnp.where(block.masked.any(-1), block.size, 0)
        logits = two_tower.denoise(config, params, state, block.tokens, t, size)
        return refine(rules, block, logits, keys, Vocabulary(config.shards.tensor))


def refine(
    rules: Diffusion, block: Block, logits: jax.Array, keys: jax.Array, vocabulary: Vocabulary = ONE_DEVICE
) -> Block:
    """What the logits (B, S, V) of a pass make of a block; see `denoise_step`."""
    active = block.masked.any(-1)
    logits = jnp.where(block.real[..., None], logits, 0)
    failed = active & vocabulary.broken(logits)
    logits = jnp.where(vocabulary.ids(logits) == rules.mask_id, -jnp.inf, logits)
    top = vocabulary.argmax(logits)
    history = block.history.add(
        jnp.where(active, block.step, block.tokens.shape[1]),
        top,
        vocabulary.probability(logits, top),
        block.masked,
    )
    logits = rules.unmasking.weigh(logits, history, block.step, vocabulary)
    seen = Seen(logits, rules.sampler.predict(logits, keys, vocabulary), block.masked, vocabulary)
    commit, doubted = rules.unmasking.choose(seen, block)
    commit, doubted = commit & ~failed[:, None], doubted & (active & ~failed)[:, None]
    tokens = jnp.where(commit, seen.predicted, block.tokens)
    return block.replace(
        tokens=jnp.where(doubted, rules.mask_id, tokens),
        masked=(block.masked & ~commit & ~failed[:, None]) | doubted,
        confidence=jnp.where(commit, seen.confidence, block.confidence),
        step=block.step + active,
        failed=block.failed | failed,
        history=history,
    )

"""Mask diffusion: a block of masks, refined by the denoiser until none is left, then read by the context tower."""

import jax
import jax.numpy as jnp
from flax import struct

from twotower_jax import two_tower
from twotower_jax.config import Config
from twotower_jax.decoding.sampling import Sampler
from twotower_jax.decoding.unmasking import ThresholdUnmasking
from twotower_jax.decoding.vocabulary import Vocabulary
from twotower_jax.state import TowerState


@struct.dataclass
class Diffusion:
    """The rules of a block.

    Attributes:
      sampler: how a token is predicted.
      unmasking: which predictions are committed.
      mask_id: the token that stands for a masked position; it is never predicted.
    """

    sampler: Sampler
    unmasking: ThresholdUnmasking
    mask_id: int


@struct.dataclass
class Block:
    """A block being denoised; each row has its own pace.

    Attributes:
      tokens: (B, S) int32, the mask id where masked.
      masked: (B, S) bool; all False in a row that is finished.
      confidence: (B, S) float32, the probability that each committed token had.
      step: (B,) int32, denoiser passes that the row has used.
      failed: (B,) bool, a logit was not finite.
      size: (B,) int32, positions of the row's block; what is beyond is padding.
    """

    tokens: jax.Array
    masked: jax.Array
    confidence: jax.Array
    step: jax.Array
    failed: jax.Array
    size: jax.Array

    @property
    def real(self) -> jax.Array:
        """(B, S) bool: no padding."""
        return jnp.arange(self.tokens.shape[1]) < self.size[:, None]


def masked_block(active: jax.Array, size: jax.Array, width: int, mask_id: int) -> Block:
    """Blocks of `size` (B,) positions, at most `width`, all of them masked in the active (B,) rows."""
    shape = (active.shape[0], width)
    block = Block(
        tokens=jnp.full(shape, mask_id, jnp.int32),
        masked=jnp.zeros(shape, bool),
        confidence=jnp.zeros(shape, jnp.float32),
        step=jnp.zeros(shape[0], jnp.int32),
        failed=jnp.zeros(shape[0], bool),
        size=size,
    )
    return block.replace(masked=block.real & active[:, None])


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
        t = block.masked.sum(-1) / block.size
        logits = two_tower.denoise(config, params, state, block.tokens, t, block.size)
        logits = jnp.where(block.real[..., None], logits, 0)
        vocabulary = Vocabulary(config.shards.tensor)
        failed = active & vocabulary.broken(logits)
        logits = jnp.where(vocabulary.ids(logits) == rules.mask_id, -jnp.inf, logits)
        predicted = rules.sampler.predict(logits, keys, vocabulary)
        confidence = vocabulary.probability(logits, predicted)
        commit = rules.unmasking.choose(confidence, block.masked, block.step) & ~failed[:, None]
        return block.replace(
            tokens=jnp.where(commit, predicted, block.tokens),
            masked=block.masked & ~commit & ~failed[:, None],
            confidence=jnp.where(commit, confidence, block.confidence),
            step=block.step + active,
            failed=block.failed | failed,
        )

"""A block of tokens that are being denoised, and what the passes over it showed."""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class History:
    """What up to P passes showed of a block, each (B, P, S); at passes that were not made it holds nothing.

    Attributes:
      top: int32, the most probable token.
      probability: float32, its own.
      masked: bool, before the pass.
    """

    top: jax.Array
    probability: jax.Array
    masked: jax.Array

    def add(self, step: jax.Array, top: jax.Array, probability: jax.Array, masked: jax.Array) -> "History":
        """With the pass numbered `step` (B,) of each row; beyond the last there is no room."""
        rows = jnp.arange(step.shape[0])
        new = History(top, probability, masked)
        return jax.tree.map(lambda old, x: old.at[rows, step].set(x, mode="drop"), self, new)


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
      history: what each pass showed.
    """

    tokens: jax.Array
    masked: jax.Array
    confidence: jax.Array
    step: jax.Array
    failed: jax.Array
    size: jax.Array
    history: History

    @property
    def real(self) -> jax.Array:
        """(B, S) bool: no padding."""
        return jnp.arange(self.tokens.shape[1]) < self.size[:, None]


def masked_block(active: jax.Array, size: jax.Array, width: int, mask_id: int) -> Block:
    """Blocks of `size` (B,) positions, at most `width`, all of them masked in the active (B,) rows."""
    rows = active.shape[0]
    shape, passes = (rows, width), (rows, width, width)
    block = Block(
        tokens=jnp.full(shape, mask_id, jnp.int32),
        masked=jnp.zeros(shape, bool),
        confidence=jnp.zeros(shape, jnp.float32),
        step=jnp.zeros(rows, jnp.int32),
        failed=jnp.zeros(rows, bool),
        size=size,
        history=History(jnp.zeros(passes, jnp.int32), jnp.zeros(passes, jnp.float32), jnp.zeros(passes, bool)),
    )
    return block.replace(masked=block.real & active[:, None])

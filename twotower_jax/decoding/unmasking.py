"""Which masked positions a denoising step commits."""

import jax
import jax.numpy as jnp
from flax import struct

from twotower_jax.decoding.sampling import of_rows


@struct.dataclass
class ThresholdUnmasking:
    """Every position surer than a threshold, and as many as are needed to end within the steps (paper, section 3).

    Attributes:
      threshold: gamma, in [0, 1]; one for all rows, (), or one for each, (B,).
      steps: T, 1 or more, likewise.
    """

    threshold: jax.Array | float
    steps: jax.Array | int

    def choose(self, confidence: jax.Array, masked: jax.Array, step: jax.Array) -> jax.Array:
        """The max(#(confidence > gamma), 1, ceil(n / (T - i))) most confident of n masked positions at step i.

        Args:
          confidence: (B, S) float32, probability of each position's predicted token.
          masked: (B, S) bool.
          step: (B,) int32, steps of this block before this one.

        Returns:
          (B, S) bool, a subset of `masked`. Of equals, the leftmost first.
        """
        confidence = jnp.where(masked, confidence, -jnp.inf)
        left = masked.sum(-1)
        above = (confidence > of_rows(self.threshold, 1)).sum(-1)
        remaining = jnp.maximum(self.steps - step, 1)
        share = (left + remaining - 1) // remaining
        wanted = jnp.maximum(jnp.maximum(above, share), 1)
        order = jnp.argsort(confidence, axis=-1, descending=True, stable=True)
        rank = jnp.argsort(order, axis=-1)
        return masked & (rank < wanted[:, None])

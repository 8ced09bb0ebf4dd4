"""When a draft is good enough to be verified."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from twotower_jax.decoding.block import Block, History
from twotower_jax.decoding.sampling import of_rows
from twotower_jax.decoding.unmasking import Seen, Unmasking
from twotower_jax.decoding.vocabulary import Vocabulary

ERRORS = 2.5  # times as many as confidences say (`python -m experiments.verified`)
GAIN = 1.0  # the share of a draft's loss that a second pass is taken to save, until a row has shown it


@struct.dataclass
class Drafting:
    """A rule of unmasking, until the block is full or another pass would cost more than it saves.

    Attributes:
      unmasking: the rule, with as many steps as drafts may have passes.
      pays: (B,) bool, rows whose draft has as many passes as pay.
      gain: (B,) float32, the share of the loss that a second pass has saved of late.
      ends: which of the tokens (B, S) end their row, (B, S) bool.
    """

    unmasking: Unmasking
    pays: jax.Array
    gain: jax.Array
    ends: Callable[[jax.Array], jax.Array] = struct.field(pytree_node=False)

    def weigh(self, logits: jax.Array, history: History, step: jax.Array, vocabulary: Vocabulary) -> jax.Array:
        """See `Unmasking.weigh`."""
        return self.unmasking.weigh(logits, history, step, vocabulary)

    def choose(self, seen: Seen, block: Block) -> tuple[jax.Array, jax.Array]:
        """See `Unmasking.choose`. What stands after a committed end of the row is committed as it is, and so is all if
        another pass is expected to save less than itself of what the draft will cost.
        """
        commit, doubted = self.unmasking.choose(seen, block)
        tokens = jnp.where(block.masked, seen.predicted, block.tokens)
        ends = self.ends(tokens) & block.real & (commit | ~block.masked)
        beyond = block.masked & (jnp.cumsum(ends, axis=1) - ends > 0)
        loss = self.loss(block, tokens, jnp.where(block.masked, seen.confidence, block.confidence))
        before = self.loss_at(block, block.step - 1)
        gain = jnp.where(block.step == 0, self.gain, jnp.minimum(self.gain, _saved(before, loss)))
        good = self.pays & (gain * loss < 1)
        doubted = doubted.at[:, 0].set(False)  # the row's last token is no draft
        return commit | beyond | (block.masked & good[:, None]), doubted & ~good[:, None]

    def loss(self, block: Block, tokens: jax.Array, confidence: jax.Array) -> jax.Array:
        """Passes that a draft is expected to cost by its errors, (B,) float32.

        A draft that goes wrong costs another one and its verification, 2 passes, for what it lacks: all that is left
        if the row ends in this block, otherwise its share of the block.

        Args:
          block: the block.
          tokens: (B, S) int32, drafted.
          confidence: (B, S) float32, theirs.
        """
        ends = self.ends(tokens) & block.real
        counts = block.real & (jnp.cumsum(ends, axis=1) - ends == 0)
        right = jnp.cumprod(jnp.where(counts, confidence, 1), axis=1)
        expected = jnp.where(counts, right, 0).sum(1)
        return 2 * ERRORS * jnp.where(ends.any(1), 1 - right[:, -1], 1 - expected / block.size)

    def loss_at(self, block: Block, step: jax.Array) -> jax.Array:
        """`loss` of what the pass numbered `step` (B,) would have drafted."""
        past = jax.tree.map(
            lambda x: jnp.take_along_axis(x, of_rows(step, 2), axis=1, mode="clip")[:, 0], block.history
        )
        tokens = jnp.where(past.masked, past.top, block.tokens)
        return self.loss(block, tokens, jnp.where(past.masked, past.probability, block.confidence))

    def learned(self, block: Block, done: jax.Array) -> jax.Array:
        """The gain (B,) after drafts that are done (B,): its mean with what a second pass saved, if there was one."""
        saved = _saved(self.loss_at(block, 0 * block.step), self.loss_at(block, 0 * block.step + 1))
        return jnp.where(done & (block.step > 1), (self.gain + saved) / 2, self.gain)


def _saved(before: jax.Array, after: jax.Array) -> jax.Array:
    return 1 - after / jnp.maximum(before, 1e-6)

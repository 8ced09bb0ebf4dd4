"""When a draft is good enough to be verified."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from twotower_jax.decoding.block import Block, History
from twotower_jax.decoding.sampling import of_rows
from twotower_jax.decoding.unmasking import Seen, Unmasking
from twotower_jax.decoding.vocabulary import Vocabulary

ERRORS = 2.5  # times as many as confidences say: what served best of 1 to 10 on the shipped model's held-out prompts
GAIN = 1.0  # the share of a draft's loss that a second pass is taken to save, until a row has shown it
ACCEPTED = 2.0  # tokens that AR is taken to accept of a draft, likewise
RETURN, RETRY = 1 / 64, 1 / 16  # how much a block without a second pass, or without a draft, gives them back


@struct.dataclass
class DraftHistory:
    """What drafts have brought of late; every array is (B,).

    Attributes:
      gain: float32, the share of its loss that a draft's second pass saved.
      accepted: float32, tokens of a draft that AR would have written.
      written: int32, the row's tokens when the last block began.
    """

    gain: jax.Array
    accepted: jax.Array
    written: jax.Array

    def after(self, starts: jax.Array, begins: jax.Array, written: jax.Array, size: jax.Array) -> "DraftHistory":
        """With how the last block ended.

        Args:
          starts: (B,) bool, rows that start a block.
          begins: (B,) bool, those whose first one it is.
          written: (B,) int32, tokens of the row.
          size: (B,) int32, of the last block; 1 if nothing was drafted.
        """
        found = (self.accepted + written - self.written - 1) / 2
        accepted = jnp.where(size > 1, found, jnp.minimum(self.accepted + RETRY, ACCEPTED))
        new = DraftHistory(self.gain, accepted, written)
        first = DraftHistory(jnp.full_like(self.gain, GAIN), jnp.full_like(accepted, ACCEPTED), written)
        mine = jax.tree.map(lambda x, y: jnp.where(begins, x, y), first, new)
        return jax.tree.map(lambda x, y: jnp.where(starts, x, y), mine, self)

    @property
    def worth_drafting(self) -> jax.Array:
        """(B,) bool: a pass of the denoiser saves one of the context tower, or more."""
        return self.accepted >= 1


def no_drafts(rows: int) -> DraftHistory:
    """Of rows that have made none."""
    return DraftHistory(jnp.zeros(rows), jnp.zeros(rows), jnp.zeros(rows, jnp.int32))


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
        """The gain (B,) after drafts that are done (B,): its mean with what a second pass saved, if there was one; if
        not, it slowly goes back to what it was at first.
        """
        saved = _saved(self.loss_at(block, 0 * block.step), self.loss_at(block, 0 * block.step + 1))
        gain = jnp.where(block.step > 1, (self.gain + saved) / 2, self.gain + RETURN * (GAIN - self.gain))
        return jnp.where(done & (block.step > 0), gain, self.gain)


def _saved(before: jax.Array, after: jax.Array) -> jax.Array:
    return jnp.clip(1 - after / jnp.maximum(before, 1e-6), 0, 1)

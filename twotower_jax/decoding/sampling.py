"""How a token is drawn from logits: greedily, or by Gumbel-max within top-k and top-p."""

import jax
import jax.numpy as jnp
from flax import struct

from twotower_jax.decoding.vocabulary import ONE_DEVICE, Vocabulary


def row_keys(seed: jax.Array, rows: jax.Array) -> jax.Array:
    """One key a row, (B,), from a seed and the rows' numbers (B,)."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)


def position_keys(keys: jax.Array, positions: jax.Array) -> jax.Array:
    """Keys (B,) and absolute positions (B, L) -> keys (B, L): a draw depends on seed, row and position alone."""
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, positions)


@struct.dataclass
class Sampler:
    """Draws a token from softmax(logits / temperature), restricted to the top k, then to the nucleus of mass top_p.

    Attributes:
      temperature: above 0; unused when greedy.
      top_p: in (0, 1], or None.
      top_k: 1 or more, or None.
      greedy: the most probable token, the lowest id among equals.
    """

    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = struct.field(pytree_node=False, default=None)
    greedy: bool = struct.field(pytree_node=False, default=False)

    def predict(self, logits: jax.Array, keys: jax.Array, vocabulary: Vocabulary = ONE_DEVICE) -> jax.Array:
        """logits (B, L, V) float32 and keys (B, L) -> tokens (B, L) int32."""
        if self.greedy:
            return vocabulary.argmax(logits)
        # From the top down, so that no temperature is too low for the quotient.
        logits = self._restrict((logits - vocabulary.max(logits)) / self.temperature, vocabulary)
        # "high" spends enough bits that the noise's tail reaches the rare tokens of a large vocabulary.
        shape = (vocabulary.size(logits),)
        noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, shape, jnp.float32, mode="high")))(keys)
        return vocabulary.argmax(logits + vocabulary.own(noise))

    def _restrict(self, logits: jax.Array, vocabulary: Vocabulary) -> jax.Array:
        if self.top_k is not None and self.top_k < vocabulary.size(logits):
            logits = jnp.where(logits < vocabulary.kth_largest(logits, self.top_k), -jnp.inf, logits)
        if self.top_p is not None:
            logits = jnp.where(logits < vocabulary.smallest_in_nucleus(logits, self.top_p), -jnp.inf, logits)
        return logits

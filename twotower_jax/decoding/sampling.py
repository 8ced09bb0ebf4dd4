"""How a token is drawn from logits: greedily, or by Gumbel-max within top-k and top-p."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from twotower_jax.decoding.vocabulary import ONE_DEVICE, Vocabulary

ALL = 2**30  # tokens: more than any vocabulary has


def row_keys(seed: jax.Array, rows: jax.Array) -> jax.Array:
    """One key a row, (B,), from a seed () or (B,) and the rows' numbers (B,)."""
    seeds = jnp.broadcast_to(seed, rows.shape)
    return jax.vmap(lambda seed, row: jax.random.fold_in(jax.random.key(seed), row))(seeds, rows)


def position_keys(keys: jax.Array, positions: jax.Array) -> jax.Array:
    """Keys (B,) and absolute positions (B, L) -> keys (B, L): a draw depends on seed, row and position alone."""
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, positions)


def of_rows(value: jax.Array, axes: int) -> jax.Array:
    """A number () or one for each row (B,), to be used with arrays of the rows that have so many more axes."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * axes) if value.ndim else value


@struct.dataclass
class Sampler:
    """Draws a token from softmax(logits / temperature), restricted to the top k, then to the nucleus of mass top_p.

    Every number is one for all rows, (), or one for each, (B,).

    Attributes:
      temperature: 0 is greedy: the most probable token, the lowest id among equals.
      top_k: of the vocabulary's size or more: all; of equals at the end all are kept.
      top_p: mass in [0, 1]; above 1: all.
      draws: False if every row is greedy, so that nothing else need be compiled.
    """

    temperature: jax.Array | float = 0.0
    top_k: jax.Array | int = ALL
    top_p: jax.Array | float = 2.0
    draws: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def of(cls, temperature: float, top_k: int | None = None, top_p: float | None = None) -> "Sampler":
        """The sampler of rows that are alike; what is None restricts nothing."""
        return cls(
            np.float32(temperature),
            np.int32(ALL if top_k is None else min(top_k, ALL)),
            np.float32(2 if top_p is None else top_p),
            draws=temperature > 0,
        )

    def predict(self, logits: jax.Array, keys: jax.Array, vocabulary: Vocabulary = ONE_DEVICE) -> jax.Array:
        """logits (B, L, V) float32 and keys (B, L) -> tokens (B, L) int32."""
        best = vocabulary.argmax(logits)
        if not self.draws:
            return best
        drawn = jnp.asarray(self.temperature) > 0
        return jax.lax.cond(
            drawn.any(),
            lambda: jnp.where(of_rows(drawn, 1), self._draw(logits, keys, vocabulary), best),
            lambda: best,
        )

    def _draw(self, logits: jax.Array, keys: jax.Array, vocabulary: Vocabulary) -> jax.Array:
        # From the top down, so that no temperature is too low for the quotient.
        temperature = of_rows(jnp.where(self.temperature > 0, self.temperature, 1.0), 2)
        logits = (logits - vocabulary.max(logits)) / temperature
        restricted = (self.top_k < ALL) | (self.top_p <= 1)
        logits = jax.lax.cond(restricted.any(), lambda: self._restrict(logits, vocabulary), lambda: logits)
        # "high" spends enough bits that the noise's tail reaches the rare tokens of a large vocabulary.
        shape = (vocabulary.size(logits),)
        noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, shape, jnp.float32, mode="high")))(keys)
        return vocabulary.argmax(logits + vocabulary.own(noise))

    def _restrict(self, logits: jax.Array, vocabulary: Vocabulary) -> jax.Array:
        top_k, top_p = of_rows(self.top_k, 2), of_rows(self.top_p, 2)
        logits = jnp.where(logits < vocabulary.kth_largest(logits, top_k), -jnp.inf, logits)
        nucleus = logits >= vocabulary.smallest_in_nucleus(logits, top_p)
        return jnp.where(nucleus | (top_p > 1), logits, -jnp.inf)

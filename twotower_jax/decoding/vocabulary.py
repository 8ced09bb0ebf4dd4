"""What a decoder asks of logits, of which each device of the axis `tensor` may hold a part of the vocabulary.

No device sees them all: between devices go a few numbers for each position.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A vocabulary over `shards` devices; logits are (..., V), V being what one device holds."""

    shards: int = 1

    def ids(self, logits: jax.Array) -> jax.Array:
        """The token ids of the logits, (V,)."""
        return self._first(logits) + jnp.arange(logits.shape[-1])

    def _first(self, logits: jax.Array) -> jax.Array | int:
        return jax.lax.axis_index("tensor") * logits.shape[-1] if self.shards > 1 else 0

    def _all(self, x: jax.Array) -> jax.Array:
        """Every device's x, (shards, ...)."""
        return jax.lax.all_gather(x, "tensor") if self.shards > 1 else x[None]

    def own(self, whole: jax.Array) -> jax.Array:
        """A device's part of something that every device has for the whole vocabulary, (..., all)."""
        if self.shards == 1:
            return whole
        size = whole.shape[-1] // self.shards
        return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index("tensor") * size, size, axis=-1)

    def size(self, logits: jax.Array) -> int:
        """Of the whole vocabulary."""
        return self.shards * logits.shape[-1]

    def argmax(self, logits: jax.Array) -> jax.Array:
        """The id of the largest, the lowest among equals: (...) int32."""
        # A CPU finds the largest and then its place in a third of the time that `jnp.argmax` takes, and a probability
        # needs the largest as well.
        value, last = logits.max(-1), logits.shape[-1] - 1
        best = jnp.where(logits == value[..., None], jnp.arange(last + 1, dtype=jnp.int32), last).min(-1)
        value, best = self._all(value), self._all(best + self._first(logits))
        return jnp.take_along_axis(best, jnp.argmax(value, axis=0)[None], axis=0)[0]

    def max(self, logits: jax.Array) -> jax.Array:
        """The largest, (..., 1)."""
        return self._all(logits.max(-1, keepdims=True)).max(0)

    def sum(self, x: jax.Array) -> jax.Array:
        """Of (..., V) over the vocabulary: (..., 1)."""
        total = x.sum(-1, keepdims=True)
        return jax.lax.psum(total, "tensor") if self.shards > 1 else total

    def any(self, flags: jax.Array) -> jax.Array:
        """Whether a flag (..., V) is set for any token, (...) bool."""
        # Counted, for XLA would join `any` with one over further axes, and read the logits once more for it.
        return self._all(flags.sum(-1, dtype=jnp.int32) > 0).any(0)

    def at(self, logits: jax.Array, token: jax.Array) -> jax.Array:
        """The logits of tokens (...): (...)."""
        place = token - self._first(logits)
        here = (place >= 0) & (place < logits.shape[-1])
        value = jnp.take_along_axis(logits, jnp.where(here, place, 0)[..., None], axis=-1)[..., 0]
        return self._all(jnp.where(here, value, -jnp.inf)).max(0)

    def add(self, logits: jax.Array, tokens: jax.Array, values: jax.Array) -> jax.Array:
        """logits (B, S, V) with values (B, S, n) added to those of tokens (B, S, n)."""
        place = tokens - self._first(logits)
        place = jnp.where(place < 0, logits.shape[-1], place)  # negative ones would count from the end
        rows, positions = jnp.ogrid[: logits.shape[0], : logits.shape[1]]
        return logits.at[rows[..., None], positions[..., None], place].add(values, mode="drop")

    def probability(self, logits: jax.Array, token: jax.Array) -> jax.Array:
        """Of tokens (...) under softmax(logits): (...) float32."""
        top = self.max(logits)
        return jnp.exp(self.at(logits, token) - top[..., 0]) / self.sum(jnp.exp(logits - top))[..., 0]

    def log_probability(self, logits: jax.Array, token: jax.Array) -> jax.Array:
        """Of tokens (...) under softmax(logits), natural: (...) float32."""
        top = self.max(logits)
        return self.at(logits, token) - top[..., 0] - jnp.log(self.sum(jnp.exp(logits - top))[..., 0])

    def broken(self, logits: jax.Array) -> jax.Array:
        """Whether a row of logits (B, L, V) has a value that is not finite, which ends it with an error: (B,) bool."""
        return self.any(~jnp.isfinite(logits)).any(-1)

    def kth_largest(self, logits: jax.Array, k: jax.Array) -> jax.Array:
        """The k-th largest logit, the least for a k beyond the vocabulary; k broadcasts to (..., 1): (..., 1)."""
        return self._least(logits, jnp.ones_like(logits), k)

    def smallest_in_nucleus(self, logits: jax.Array, mass: jax.Array) -> jax.Array:
        """The least logit among the most probable tokens that come before `mass` is full, the first always: (..., 1).

        The mass broadcasts to (..., 1).
        """
        probability = jnp.exp(logits - self.max(logits))
        return self._least(logits, probability, mass * self.sum(probability))

    def _least(self, logits: jax.Array, weight: jax.Array, wanted: jax.Array) -> jax.Array:
        """The least logit that is kept, if tokens are kept from the top until their weights reach what is wanted.

        Found by halving, between floats as whole numbers in their order, so that nothing need be sorted.
        """
        order = _as_ordered(logits)

        def kept(bound):
            """Whether a token at the bound would be kept: those above it do not weigh enough."""
            return self.sum(jnp.where(order > bound, weight, 0)) < wanted

        def halve(_, ends):
            low, high = ends  # low is not kept, high is
            middle = (low & high) + ((low ^ high) >> 1)
            keep = kept(middle)
            return jnp.where(keep, low, middle), jnp.where(keep, middle, high)

        high = _as_ordered(self.max(logits))
        low = jnp.full_like(high, jnp.iinfo(jnp.int32).min)
        bound = jax.lax.fori_loop(0, 32, halve, (low, high))[1]
        return -self.max(jnp.where(order >= bound, -logits, -jnp.inf))


ONE_DEVICE = Vocabulary()


def _as_ordered(x: jax.Array) -> jax.Array:
    """float32 as int32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

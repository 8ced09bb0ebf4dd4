"""What has been written so far, and what the next token's draw depends on."""

import jax
import jax.numpy as jnp
from flax import struct

from twotower_jax.decoding.sampling import position_keys, row_keys


@struct.dataclass
class Request:
    """A batch, as programs take it.

    Attributes:
      prompts: (B, L) int32, padded on the right.
      count: (B,) int32, the prompts' lengths.
      rows: (B,) int32, numbers that the rows' random keys come from.
      seed: () uint32.
      eos: (n,) int32, ids that end a row.
      units: () int32, blocks or tokens to be written, at most as many as there is room for.
    """

    prompts: jax.Array
    count: jax.Array
    rows: jax.Array
    seed: jax.Array
    eos: jax.Array
    units: jax.Array

    def keys(self, written: jax.Array, size: int) -> jax.Array:
        """Of the `size` positions after so many () new tokens: (B, size)."""
        positions = self.count[:, None] + written + jnp.arange(size)
        return position_keys(row_keys(self.seed, self.rows), positions)


@struct.dataclass
class Progress:
    """Rows between two units (blocks, or tokens).

    Attributes:
      tokens: (B, room) int32, the new tokens, of which each row's first `length` count.
      unit: () int32, how many are done.
      length: (B,) int32.
      forwards: (B,) int32, passes that the row has needed.
      done: (B,) bool, rows that have ended.
      failed: (B,) bool, rows that ended as a logit was not finite.
    """

    tokens: jax.Array
    unit: jax.Array
    length: jax.Array
    forwards: jax.Array
    done: jax.Array
    failed: jax.Array

    def add(self, tokens: jax.Array, forwards: jax.Array, failed: jax.Array, ended: jax.Array) -> "Progress":
        """With the next unit's tokens (B, n) and passes (B,); which rows failed or ended in it (B,)."""
        active, size = ~self.done, tokens.shape[1]
        return Progress(
            tokens=jax.lax.dynamic_update_slice(self.tokens, tokens, (0, self.unit * size)),
            unit=self.unit + 1,
            length=self.length + jnp.where(active & ~failed, size, 0),
            forwards=self.forwards + forwards,
            done=self.done | failed | ended,
            failed=self.failed | (active & failed),
        )


def nothing_written(rows: int, room: int) -> Progress:
    """The progress of rows that are about to write up to `room` tokens."""
    none, no = jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool)
    return Progress(jnp.zeros((rows, room), jnp.int32), jnp.zeros((), jnp.int32), none, none, no, no)

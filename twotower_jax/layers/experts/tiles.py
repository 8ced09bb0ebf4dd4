"""Choices by expert, and cut into tiles of one expert each.

A choice is one of a token's k experts: choice c is of token c // k. Choices of an expert that is not here, whose number
is E, belong to no tile.
"""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Tiles:
    """Choices that are multiplied together; those beyond the last real tile are empty.

    Attributes:
      expert: (tiles,) int32, below E.
      start, stop: (tiles,) int32, places in `order`.
      count: () int32, beyond which they are empty.
    """

    expert: jax.Array
    start: jax.Array
    stop: jax.Array
    count: jax.Array


@flax.struct.dataclass
class Sorted:
    """Choices by expert, in the order of tokens; those of absent experts last.

    Attributes:
      order: (n,) int32, the choices.
      stops: (E,) int32, the place after each expert's last one.
    """

    order: jax.Array
    stops: jax.Array

    @property
    def starts(self) -> jax.Array:
        """(E,) int32, the place of each expert's first."""
        return jnp.pad(self.stops[:-1], (1, 0))

    def tiles(self, rows: int) -> Tiles:
        """Tiles of up to `rows` choices, as many as are needed when every expert's last tile holds one."""
        choices, total = self.order.size, self.stops.size
        ends = jnp.cumsum(-(-(self.stops - self.starts) // rows))
        experts = min(choices, total)
        number = jnp.arange(experts + (choices - experts) // rows, dtype=jnp.int32)
        expert = jnp.minimum((ends <= number[:, None]).sum(-1, dtype=jnp.int32), total - 1)
        start = self.starts[expert] + (number - jnp.pad(ends[:-1], (1, 0))[expert]) * rows
        return Tiles(expert, start, jnp.minimum(start + rows, self.stops[expert]), ends[-1])


@flax.struct.dataclass
class Unsorted:
    """Choices as they are, each a tile: nothing to wait for, where tokens hardly share an expert.

    Attributes:
      experts: (n,) int32.
      total: E.
    """

    experts: jax.Array
    total: int = flax.struct.field(pytree_node=False)

    @property
    def order(self) -> jax.Array:
        return jnp.arange(self.experts.size, dtype=jnp.int32)

    def tiles(self, rows: int) -> Tiles:
        """Tiles of one choice."""
        stop = self.order + (self.experts < self.total)
        return Tiles(jnp.minimum(self.experts, self.total - 1), self.order, stop, jnp.int32(self.order.size))


def by_expert(experts: jax.Array, total: int) -> Sorted:
    """experts (tokens, k) int32, of which `total` are here."""
    experts = experts.reshape(-1)
    number = experts * experts.size + jnp.arange(experts.size, dtype=jnp.int32)  # sorting one array is faster than two
    stops = (experts <= jnp.arange(total)[:, None]).sum(-1, dtype=jnp.int32)
    return Sorted(jnp.sort(number) % experts.size, stops)

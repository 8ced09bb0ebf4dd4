"""Writing and reading in turn: the denoiser writes a unit, a block or a token, and the context tower reads it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from twotower_jax import two_tower
from twotower_jax.config import Config
from twotower_jax.decoding.autoregressive import MockAR
from twotower_jax.decoding.diffusion import Diffusion
from twotower_jax.decoding.progress import Progress, Request, nothing_written
from twotower_jax.layers.collectives import any_row
from twotower_jax.state import TowerState

Writer = Diffusion | MockAR


def read(config: Config, params: dict, state: TowerState, tokens: jax.Array, done: jax.Array) -> TowerState:
    """The context tower reads what was written (B, n); of rows that are done nothing more is read."""
    with jax.named_scope("commit"):
        return two_tower.extend(config, params, state, tokens, jnp.where(done, 0, tokens.shape[1]))[1]


def when(condition: jax.Array, change: Callable, value: Any) -> Any:
    """`change(value)` if the condition holds: a loop of one turn or none, which works in place where `cond` copies."""
    return jax.lax.while_loop(lambda c: c[0], lambda c: (jnp.array(False), change(c[1])), (condition, value))[1]


def generate(config: Config, params: dict, writer: Writer, request: Request, *, capacity: int, room: int) -> Progress:
    """Unit after unit, until every row has ended or `request.units` are done.

    Args:
      config: dimensions.
      params: parameters of both towers.
      writer: the rules.
      request: the batch.
      capacity: tokens that the context's state has room for.
      room: new tokens that the result has room for.
    """
    _, state = two_tower.prefill(config, params, request.prompts, writer.read_before(request), capacity)

    def unit(carry: tuple[TowerState, Progress]) -> tuple[TowerState, Progress]:
        state, p = carry
        p, tokens = writer.write(config, params, state, p, request)
        more = (p.unit < request.units) & any_row(~p.done, config)
        return when(more, lambda state: read(config, params, state, tokens, p.done), state), p

    def more(carry: tuple[TowerState, Progress]) -> jax.Array:
        return (carry[1].unit < request.units) & any_row(~carry[1].done, config)

    return jax.lax.while_loop(more, unit, (state, nothing_written(request.count.shape[0], room)))[1]

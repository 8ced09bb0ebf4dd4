"""Rows that have read random tokens: their states, and the experts that they chose.

Each is read alone, by programs of one row: what a row does depends on no other, so that what several choose together is
what each chooses.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twotower_jax import two_tower
from twotower_jax.config import MOE, Config
from twotower_jax.decoding.block import masked_block
from twotower_jax.decoding.diffusion import Diffusion, denoise_step
from twotower_jax.decoding.sampling import Sampler
from twotower_jax.decoding.unmasking import Unmasking
from twotower_jax.placement import Group
from twotower_jax.programs import Program, Programs
from twotower_jax.shapes import Shapes
from twotower_jax.sharding import WHOLE
from twotower_jax.state import Span, TowerState, empty_state
from twotower_jax.tower import Tower

Choices = np.ndarray  # (layers of experts, E) bool, or with axes before


@dataclasses.dataclass(frozen=True)
class ReadRows:
    """Rows that have read `context` tokens each.

    Attributes:
      tokens: (rows, context + S) int32, the prompts and what may come next; see `tokens_of`.
      states: of one row each, on the host.
      block_choices: (rows, pieces of S tokens, layers of experts, E) bool, the context tower's, the last of them for
        what comes after the context.
      token_choices: (rows, steps, layers of experts, E) bool, its own in AR.
      pass_choices: likewise the denoiser's, in each pass over a block; see `denoised`.
    """

    tokens: np.ndarray
    states: list[TowerState]
    block_choices: Choices
    token_choices: Choices
    pass_choices: Choices | None = None

    def batch(self, rows: int) -> TowerState:
        """The state of the first rows, on the host."""
        return jax.tree.map(lambda *x: np.concatenate(x), *self.states[:rows])


def together(choices: Choices, rows: int) -> np.ndarray:
    """How many different experts the first rows choose, for each layer; the mean of the steps.

    Args:
      choices: (rows, steps, layers of experts, E) bool.
      rows: how many.
    """
    return choices[:rows].any(0).sum(-1).mean(0)


def tokens_of(config: Config, rows: int, length: int) -> np.ndarray:
    """(rows, length) int32 at random, the same for every run."""
    return np.random.default_rng(0).integers(0, config.vocab_size, (rows, length), np.int32)


@dataclasses.dataclass(frozen=True)
class Reader:
    """The programs of one row.

    Attributes:
      programs: that are compiled.
      config, group: dimensions and the device.
      capacity: positions of a state.
      block_size: S.
      mask_id: the token that stands for a masked position.
    """

    programs: Programs
    config: Config
    group: Group
    capacity: int
    block_size: int
    mask_id: int

    def begin(self, params: dict) -> None:
        """Has all of them begin to compile, given the shapes of the towers' parameters."""
        state = jax.eval_shape(lambda: empty_state(self.config, 1, self.capacity, two_tower.dtype_of(params)))
        for length in (self.block_size, 1):
            tokens = jax.ShapeDtypeStruct((1, length), np.int32)
            self._program(self.programs.ahead, _extend, {"context": params["context"]}, state, tokens)
        if "denoiser" in params:
            self._pass(self.programs.ahead, {"denoiser": params["denoiser"]}, state)

    def read(self, params: dict, rows: int, context: int) -> ReadRows:
        """The context tower reads rows, `block_size` tokens at a time, and then writes as many by itself.

        Args:
          params: with the context tower's.
          rows: how many.
          context: tokens of each, a multiple of `block_size`.
        """
        size, group, dtype = self.block_size, self.group, two_tower.dtype_of(params)
        tokens = tokens_of(self.config, rows, context + size)
        params = {"context": params["context"]}
        start = group.put(jax.tree.map(np.asarray, empty_state(self.config, 1, self.capacity, dtype)), WHOLE)
        some, one = (self._program(self.programs.take, _extend, params, start, tokens[:1, :n]).call for n in (size, 1))
        states, blocks, steps = [], [], []
        for row in tokens:
            state, chosen = start, []
            for at in range(0, context + size, size):
                if at == context:
                    before = state
                _, state, loads = some(params, state, row[None, at : at + size])
                chosen.append(loads)
            states.append(jax.tree.map(np.asarray, before))
            blocks.append(_choices(chosen))
            last, state, chosen = row[None, context - 1 : context], before, []
            for _ in range(size):
                last, state, loads = one(params, state, last)
                chosen.append(loads)
            steps.append(_choices(chosen))
        return ReadRows(tokens, states, np.stack(blocks), np.stack(steps))

    def denoised(self, params: dict, rows: ReadRows) -> ReadRows:
        """With what the denoiser's experts are in passes over a block of which every pass commits one token."""
        params, found = {"denoiser": params["denoiser"]}, []
        for row in rows.states:
            now, chosen = self.group.put(jax.tree.map(np.asarray, self._block), WHOLE), []
            state = self.group.put(row, WHOLE)
            step = self._pass(self.programs.take, params, state).call
            for _ in range(self.block_size):
                now, loads = step(params, state, now)
                chosen.append(loads)
            found.append(_choices(chosen))
        return dataclasses.replace(rows, pass_choices=np.stack(found))

    @property
    def _block(self) -> Any:
        return masked_block(np.ones(1, bool), np.full(1, self.block_size, np.int32), self.block_size, self.mask_id)

    def _pass(self, compile: Callable, params: dict, state: TowerState) -> Any:
        return self._program(compile, _denoise, params, state, self._block, mask_id=self.mask_id)

    def _program(self, compile: Callable, function: Callable, *arrays: Any, **sizes: Any) -> Any:
        """`Programs.ahead` or `.take` of a program."""
        shapes = Shapes.like(self.group).put(arrays, WHOLE)
        return compile(self.group, Program(function, tuple(WHOLE for _ in arrays), WHOLE), *shapes, **sizes)


def _extend(config: Config, params: dict, state: TowerState, tokens: jax.Array) -> tuple[jax.Array, TowerState, Any]:
    """The most probable next token (1, 1), the state after the tokens (1, L), and the experts' loads."""
    span = Span(state.length, jnp.full_like(state.length, tokens.shape[1]), count_experts=True)
    hidden, after = Tower(config).apply({"params": params["context"]["tower"]}, tokens, state, span)
    following = jnp.argmax(two_tower.context_head(params, hidden[:, -1:]), axis=-1).astype(jnp.int32)
    layers = [
        old if kind == MOE else new for kind, old, new in zip(config.pattern, state.layers, after.layers, strict=True)
    ]
    return following, after.replace(layers=tuple(layers)), _loads(config, after)


def _denoise(config: Config, params: dict, state: TowerState, block: Any, *, mask_id: int) -> tuple[Any, Any]:
    """The block after a pass, and the experts' loads."""
    t = block.masked.sum(-1) / block.size
    _, layers = two_tower.denoiser_hidden(config, params["denoiser"], state, block.tokens, t, count_experts=True)
    rules = Diffusion(Sampler(), Unmasking(jnp.ones(1), block.tokens.shape[1]), mask_id)
    keys = jnp.zeros(block.tokens.shape, jnp.uint32)  # a greedy sampler draws nothing
    return denoise_step(config, params, rules, state, block, keys), _loads(config, layers)


def _loads(config: Config, state: TowerState) -> jax.Array:
    """(layers of experts, E) int32."""
    loads = [layer for kind, layer in zip(config.pattern, state.layers, strict=True) if kind == MOE]
    return jnp.stack(loads) if loads else jnp.zeros((0, config.experts), jnp.int32)


def _choices(loads: list[jax.Array]) -> Choices:
    return np.stack(jax.device_get(loads)) > 0

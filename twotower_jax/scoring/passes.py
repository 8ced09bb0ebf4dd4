"""What the devices do in a pass: read pieces, denoise blocks, and answer what is asked of their positions.

Each function is a program's, on one device's part of the rows; states stay on the device that made them.
"""

import jax
import jax.numpy as jnp
from flax import struct

from twotower_jax import two_tower
from twotower_jax.config import Config
from twotower_jax.decoding.vocabulary import Vocabulary
from twotower_jax.layers.linear import project
from twotower_jax.state import KVCache, TowerState

TOGETHER = 128  # positions whose logits are there at a time


@struct.dataclass
class Pieces:
    """n pieces; every array is (n,), int32 where nothing else is said.

    Attributes:
      source: the row of the state before.
      fresh: bool, there is none before.
      target: the row for the state after; one beyond the last is for none.
      tokens: (n, L), of which `count` are real.
    """

    source: jax.Array
    fresh: jax.Array
    target: jax.Array
    tokens: jax.Array
    count: jax.Array


@struct.dataclass
class Questions:
    """place (M,) int32, a position of the pass, its rows one after the other; token (M,) int32. Asked are the first."""

    place: jax.Array
    token: jax.Array


@struct.dataclass
class Answers:
    """logprob (M,) float32, natural; best (M,) bool, the most probable, of equals the first; broken (M,) bool, a logit
    there is not finite.
    """

    logprob: jax.Array
    best: jax.Array
    broken: jax.Array


@struct.dataclass
class Blocks:
    """n blocks: tokens (n, S) int32, masked (n, S) bool, size (n,) int32."""

    tokens: jax.Array
    masked: jax.Array
    size: jax.Array


def answer(config: Config, head: jax.Array, hidden: jax.Array, questions: Questions, turns: jax.Array) -> Answers:
    """What the logits at some positions say of tokens, `TOGETHER` positions at a time.

    Args:
      config: dimensions.
      head: (D, V).
      hidden: (n, L, D).
      questions: M of them, a multiple of `TOGETHER`.
      turns: () int32, after which those that are asked are answered.
    """
    hidden, vocabulary = hidden.reshape(-1, hidden.shape[-1]), Vocabulary(config.shards.tensor)

    def turn(i: jax.Array, answers: Answers) -> Answers:
        place, token = (
            jax.lax.dynamic_slice_in_dim(x, i * TOGETHER, TOGETHER) for x in (questions.place, questions.token)
        )
        logits = project(hidden[place], head, out=jnp.float32)
        found = Answers(
            logprob=vocabulary.log_probability(logits, token),
            best=vocabulary.argmax(logits) == token,
            broken=vocabulary.any(~jnp.isfinite(logits)),
        )
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, i * TOGETHER, 0), answers, found)

    with jax.named_scope("answer"):
        none, no = jnp.zeros(len(questions.token), jnp.float32), jnp.zeros(len(questions.token), bool)
        return jax.lax.fori_loop(0, turns, turn, Answers(none, no, no))


def read(
    config: Config,
    params: dict,
    held: TowerState,
    pieces: Pieces,
    questions: Questions,
    turns: jax.Array,
    *,
    capacity: int,
) -> tuple[TowerState, Answers]:
    """The context tower reads pieces, each after a state that is held, in caches of `capacity` positions.

    Returns:
      the states that are held then, and the answers by the context tower.
    """
    before = take(config, held, pieces.source, capacity=capacity)
    before = jax.tree.map(
        lambda x: jnp.where(pieces.fresh.reshape(-1, *[1] * (x.ndim - 1)), jnp.zeros_like(x), x), before
    )
    before = jax.lax.optimization_barrier(before)  # the same sums, however many positions are held
    hidden, after = two_tower.extend(config, params, before, pieces.tokens, pieces.count)

    def put(old, new):
        if isinstance(old, KVCache):
            return jax.tree.map(lambda x, y: x.at[pieces.target, :, :capacity].set(y, mode="drop"), old, new)
        return jax.tree.map(lambda x, y: x.at[pieces.target].set(y, mode="drop"), old, new)

    layers = tuple(map(put, held.layers, after.layers))
    held = held.replace(layers=layers, length=put(held.length, after.length))
    return held, answer(config, params["context"]["head"], hidden, questions, turns)


def take(config: Config, held: TowerState, rows: jax.Array, *, capacity: int) -> TowerState:
    """The states of some rows (n,), with caches of `capacity` positions that hold nothing beyond their length."""
    length = held.length[rows]
    real = (jnp.arange(capacity) < length[:, None])[:, None, :, None]

    def one(layer):
        if isinstance(layer, KVCache):  # what other states left there need not be finite
            return jax.tree.map(lambda x: jnp.where(real, x[rows, :, :capacity], 0), layer)
        return jax.tree.map(lambda x: x[rows], layer)

    return TowerState(tuple(map(one, held.layers)), length)


def denoise(
    config: Config,
    params: dict,
    state: TowerState,
    blocks: Blocks,
    questions: Questions,
    turns: jax.Array,
    mask_id: jax.Array,
) -> Answers:
    """One pass of the denoiser over blocks after their states (n rows), and its answers."""
    noisy = jnp.where(blocks.masked, mask_id, blocks.tokens)
    t = blocks.masked.sum(-1) / blocks.size
    hidden, _ = two_tower.denoiser_hidden(config, params["denoiser"], state, noisy, t, size=blocks.size)
    return answer(config, params["denoiser"]["head"], hidden, questions, turns)

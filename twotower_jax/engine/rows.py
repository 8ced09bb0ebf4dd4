"""Rows on the devices: what is asked of each, how far it is, and the context's state of it."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from twotower_jax.config import Config
from twotower_jax.decoding import BLOCK_MODES, MODES
from twotower_jax.decoding.block import Block, masked_block
from twotower_jax.decoding.drafting import DraftHistory, no_drafts
from twotower_jax.decoding.sampling import ALL, Sampler, position_keys, row_keys
from twotower_jax.decoding.unmasking import NAMES, Unmasking
from twotower_jax.engine.request import STOP_IDS, Request
from twotower_jax.state import TowerState, empty_state

EMPTY = -1  # the ticket of a place that no row has


@dataclasses.dataclass(frozen=True)
class Kinds:
    """What rows may ask that programs are compiled for.

    Attributes:
      draws: whether a row may have a temperature.
      rules: of unmasking that a row may have.
    """

    draws: bool = False
    rules: tuple[str, ...] = ()

    def including(self, request: Request) -> "Kinds":
        """With what a checked request asks."""
        rules = {*self.rules, request.unmasking.rule} if request.mode in BLOCK_MODES else self.rules
        return Kinds(self.draws or request.temperature > 0, tuple(sorted(rules, key=NAMES.index)))


@struct.dataclass
class Rows:
    """What is asked of n rows, and how far they are; every array is (n,), int32 where nothing else is said.

    Attributes:
      ticket: the request's number, `EMPTY` where there is no row.
      mode: an index of `MODES`.
      count: tokens of the prompt.
      limit: new tokens.
      size: of a block.
      steps: most denoiser passes a block, or of a draft; 0 in a draft: as many as pay.
      rule: an index of `unmasking.NAMES`.
      bound, doubt: float32, the rule's.
      accept: float32, the probability from which a draft is accepted; above 1 it must be AR's own token.
      temperature, top_p: float32.
      top_k: see `Sampler`.
      eos: (n, STOP_IDS), EMPTY where there are fewer.
      seed: uint32.
      number: with the seed and the position, what draws depend on.
      last: the token that is read next where one is written at a time.
      written: new tokens so far.
    """

    ticket: jax.Array
    mode: jax.Array
    count: jax.Array
    limit: jax.Array
    size: jax.Array
    steps: jax.Array
    rule: jax.Array
    bound: jax.Array
    doubt: jax.Array
    accept: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    eos: jax.Array
    seed: jax.Array
    number: jax.Array
    last: jax.Array
    written: jax.Array

    def of_mode(self, mode: str) -> jax.Array:
        """(n,) bool: the rows that are decoded so."""
        return (self.ticket != EMPTY) & (self.mode == MODES.index(mode))

    def keys(self, size: int, last: bool = False) -> jax.Array:
        """Of `size` positions from the next one on, or from the `last` one, (n, size)."""
        positions = (self.count + self.written)[:, None] + jnp.arange(size) - last
        return position_keys(row_keys(self.seed, self.number), positions)

    def sampler(self, kinds: Kinds) -> Sampler:
        """What draws the rows' tokens."""
        return Sampler(self.temperature, self.top_k, self.top_p, kinds.draws)

    def unmasking(self, kinds: Kinds) -> Unmasking:
        """What commits them."""
        return Unmasking(self.bound, self.steps, self.rule, self.doubt, kinds.rules)

    def ends(self, tokens: jax.Array) -> jax.Array:
        """Which of the tokens (n, L) end their row, (n, L) bool."""
        return (tokens[..., None] == self.eos[:, None]).any(-1)


def as_rows(requests: Sequence[Request | None], tickets: Sequence[int]) -> Rows:
    """Checked requests as rows on the host; where there is None the place is empty."""

    def column(of, dtype, empty=0):
        return np.asarray([empty if r is None else of(r) for r in requests], dtype)

    eos = np.full((len(requests), STOP_IDS), EMPTY, np.int32)
    for own, request in zip(eos, requests, strict=True):
        if request is not None:
            own[: len(request.eos_token_id)] = request.eos_token_id
    return Rows(
        ticket=np.asarray(tickets, np.int32),
        mode=column(lambda r: MODES.index(r.mode), np.int32),
        count=column(lambda r: len(r.prompt), np.int32),
        limit=column(lambda r: r.max_new_tokens, np.int32),
        size=column(lambda r: r.block_size, np.int32, 1),
        steps=column(lambda r: (r.draft_passes or 0) if r.mode == "verified" else r.steps_per_block, np.int32, 1),
        rule=column(lambda r: NAMES.index(r.unmasking.rule), np.int32),
        bound=column(lambda r: r.unmasking.bound, np.float32),
        doubt=column(lambda r: r.unmasking.doubt, np.float32),
        accept=column(lambda r: 2 if r.accept_probability is None else r.accept_probability, np.float32, 2),
        temperature=column(lambda r: r.temperature, np.float32),
        top_p=column(lambda r: 2 if r.top_p is None else r.top_p, np.float32, 2),
        top_k=column(lambda r: ALL if r.top_k is None else min(r.top_k, ALL), np.int32, ALL),
        eos=eos,
        seed=column(lambda r: r.seed, np.uint32),
        number=column(lambda r: r.row, np.int32),
        last=column(lambda r: r.prompt[-1], np.int32),
        written=np.zeros(len(requests), np.int32),
    )


@struct.dataclass
class Bench:
    """R rows whose prompts are being read, or wait for a slot.

    Attributes:
      rows: the rows.
      waiting: (R,) bool, prompts that are read.
      state: the context's.
    """

    rows: Rows
    waiting: jax.Array
    state: TowerState


@struct.dataclass
class Piece:
    """What comes to the bench in a round.

    Attributes:
      rows: new rows, where `fresh` is set.
      fresh: (R,) bool.
      known: (R,) bool, fresh rows that begin with the shared prefix, which is read.
      tokens: (R, C) int32, the next of each prompt, of which `count` are read.
      count: (R,) int32.
      ready: (R,) bool, rows whose prompt ends with these.
    """

    rows: Rows
    fresh: jax.Array
    known: jax.Array
    tokens: jax.Array
    count: jax.Array
    ready: jax.Array


def no_piece(rows: int, width: int) -> Piece:
    """Nothing, on the host."""
    none = np.zeros(rows, bool)
    tokens, count = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
    return Piece(as_rows([None] * rows, [EMPTY] * rows), none, none, tokens, count, none)


@struct.dataclass
class Slots:
    """B rows that are being written.

    Attributes:
      rows: the rows.
      state: the context's, before each row's block.
      block: the blocks, of rows that are denoised.
      begun: (B,) bool, rows whose block is being denoised.
      history: of drafts.
      held: (B, S) int32, what the last draft has right after a token that was wrong, up to the row's end, where it goes
        in the next draft; EMPTY elsewhere.
    """

    rows: Rows
    state: TowerState
    block: Block
    begun: jax.Array
    history: DraftHistory
    held: jax.Array


@struct.dataclass
class News:
    """What B slots wrote in a round.

    Attributes:
      ticket: (B,) int32, whose row is or was there.
      tokens: (B, n) int32, of which `count` (B,) are new.
      probability: (B, n) float32, that the tokens had.
      count: (B,) int32.
      forwards: (B,) int32, passes that the complete blocks or tokens needed, of the denoiser, or of AR's context tower.
      ended: (B,) bool.
      failed: (B,) bool, ended as a logit was not finite.
    """

    ticket: jax.Array
    tokens: jax.Array
    probability: jax.Array
    count: jax.Array
    forwards: jax.Array
    ended: jax.Array
    failed: jax.Array


def empty_bench(config: Config, rows: int, capacity: int, dtype: jnp.dtype) -> Bench:
    """With no rows."""
    return Bench(_no_rows(rows), jnp.zeros(rows, bool), empty_state(config, rows, capacity, dtype))


def empty_slots(config: Config, rows: int, capacity: int, block_size: int, dtype: jnp.dtype) -> Slots:
    """With no rows."""
    no, held = jnp.zeros(rows, bool), jnp.full((rows, block_size), EMPTY, jnp.int32)
    block = masked_block(no, jnp.ones(rows, jnp.int32), block_size, mask_id=0)
    return Slots(_no_rows(rows), empty_state(config, rows, capacity, dtype), block, no, no_drafts(rows), held)


def _no_rows(count: int) -> Rows:
    return jax.tree.map(jnp.asarray, as_rows([None] * count, [EMPTY] * count))

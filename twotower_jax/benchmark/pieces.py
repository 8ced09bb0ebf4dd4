"""The pieces of decoding, each a program as the engine has it, on rows that have read a context.

A program gives back the state that it was given in the same memory, as long as it was, so that every call begins at the
same length.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twotower_jax import two_tower
from twotower_jax.benchmark import limits
from twotower_jax.benchmark.clock import Seconds, seconds
from twotower_jax.benchmark.limits import Pass, Work
from twotower_jax.benchmark.rows import Choices, ReadRows, together
from twotower_jax.config import Config
from twotower_jax.decoding.block import masked_block
from twotower_jax.decoding.diffusion import Diffusion, refine
from twotower_jax.decoding.sampling import Sampler
from twotower_jax.decoding.unmasking import Unmasking
from twotower_jax.decoding.vocabulary import Vocabulary
from twotower_jax.engine import steps, verified
from twotower_jax.engine.request import Request
from twotower_jax.engine.rows import Kinds, Slots, as_rows, empty_slots
from twotower_jax.engine.sizes import piece_of
from twotower_jax.placement import Group
from twotower_jax.programs import Program
from twotower_jax.sharding import WHOLE

GREEDY, THRESHOLD = Kinds(), Kinds(rules=("threshold",))
NEVER = 1.0  # a threshold that no probability is above: every pass commits what the number of passes asks
FOREVER = 2**20  # tokens: no row ends in a benchmark


@dataclasses.dataclass(frozen=True)
class Piece:
    """A program that is timed.

    Attributes:
      name: in the table.
      tower: whose parameters it takes, or None.
      function: called with dimensions, parameters, what it gives back (donated), other arrays, and sizes; gives what it
        gives back and the rest of what it made, all of it, so that no work is left out.
      kept: what it gives back.
      arrays, sizes: the others.
      count: how often a call does what is timed.
      work: of doing it once.
      experts: different experts of a layer that are read, the mean over the layers; None if none are.
    """

    name: str
    tower: str | None
    function: Callable
    kept: Any
    arrays: tuple
    sizes: dict[str, Any]
    work: Work
    count: int = 1
    experts: float | None = None


@dataclasses.dataclass(frozen=True)
class Timed:
    """How long a piece took.

    Attributes:
      seconds: of doing it once.
      compile_seconds: of its program.
      temporary_bytes: that its program needs beside what it takes and gives; None where the compiler does not say.
    """

    seconds: Seconds
    compile_seconds: float
    temporary_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Setting:
    """Rows at a stated length.

    Attributes:
      config, group, dtype: the model's dimensions, its device, and what it computes in.
      read: all rows that were read, of which the first `rows` are taken.
      rows: B.
      context: tokens that each has read.
      capacity: positions of a row's state.
      block_size: S.
      mask_id: the token that stands for a masked position.
    """

    config: Config
    group: Group
    dtype: np.dtype
    read: ReadRows
    rows: int
    context: int
    capacity: int
    block_size: int
    mask_id: int

    def slots(self, mode: str, length: int | None = None) -> Slots:
        """Rows of a mode that are being written, on the host; as long as they have read, unless it is said."""
        asked = {"mode": mode, "max_new_tokens": FOREVER, "block_size": self.block_size, "draft_passes": 1}
        asked |= {"steps_per_block": self.block_size, "confidence_threshold": NEVER}
        prompts = self.read.tokens[: self.rows, : self.context]
        requests = [Request(i, p, **asked).checked(self.config.vocab_size, True) for i, p in enumerate(prompts)]
        state = self.read.batch(self.rows)
        empty = jax.eval_shape(lambda: empty_slots(self.config, self.rows, 1, self.block_size, self.dtype))
        empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), empty)
        state = state.replace(length=self.all_of(self.context if length is None else length))
        return empty.replace(rows=as_rows(requests, range(self.rows)), state=state)

    @property
    def block(self) -> np.ndarray:
        """(rows, S) int32: what comes after the context."""
        return self.read.tokens[: self.rows, self.context :]

    def all_of(self, size: int) -> np.ndarray:
        return np.full(self.rows, size, np.int32)


def _held(before: Slots, after: Slots) -> Slots:
    """The state that a program left, at the length before, and everything else as it was."""
    return before.replace(state=after.state.replace(length=before.state.length))


def write(config: Config, params: dict, slots: Slots, share: jax.Array, *, tokens: int) -> tuple[Slots, Any]:
    """The engine's AR: so many tokens of each row."""
    after, news = steps.write(config, params, slots, share, mode="ar", tokens=tokens, kinds=GREEDY)
    return _held(slots, after), (after.rows, news)


def denoise(config: Config, params: dict, slots: Slots, share: jax.Array, mask_id: jax.Array) -> tuple[Slots, Any]:
    """The engine's passes over a block of which each commits one token, without the commit."""
    most = slots.begun.shape[0]
    after, news, reads = steps.denoise(config, params, slots, share, mask_id, kinds=THRESHOLD, most=most)
    return _held(slots, after), (after.block, news, reads)


def commit(config: Config, params: dict, slots: Slots, tokens: jax.Array, count: jax.Array) -> tuple[Slots, Any]:
    """The engine's commit of a block of every row."""
    state, rows = steps.read(config, params, slots.state, tokens, count, tokens.shape[0])
    return _held(slots, slots.replace(state=state)), rows


def verify(config: Config, params: dict, slots: Slots, tokens: jax.Array, count: jax.Array) -> tuple[Slots, Any]:
    """The engine's verification of a draft of every row."""
    sizes = {"kinds": THRESHOLD, "most": tokens.shape[0]}
    after, news, rows = verified.verify(config, params, slots, tokens, count, jnp.ones_like(count), **sizes)
    return _held(slots, after), (after.rows, after.held, news, rows)


def prefill(config: Config, params: dict, slots: Slots, tokens: jax.Array, count: jax.Array) -> tuple[Slots, Any]:
    """What the engine reads of prompts at once, on its bench."""
    _, state = two_tower.extend(config, params, slots.state, tokens, count)
    return _held(slots, slots.replace(state=state)), ()


def head(config: Config, params: dict, kept: tuple, hidden: jax.Array) -> tuple[tuple, Any]:
    """The logits of every position."""
    return kept, two_tower.context_head(params, hidden)


def sample(config: Config, params: dict, kept: tuple, logits: jax.Array) -> tuple[tuple, Any]:
    """AR's greedy tokens, their probabilities, and whether a logit is not finite."""
    vocabulary = Vocabulary(config.shards.tensor)
    drawn = Sampler().predict(logits, jnp.zeros(logits.shape[:2], jnp.uint32), vocabulary)
    return kept, (drawn, vocabulary.probability(logits, drawn), vocabulary.broken(logits))


def refined(config: Config, params: dict, kept: tuple, logits: jax.Array, *, mask_id: int) -> tuple[tuple, Any]:
    """What the logits of a pass make of blocks of masks."""
    rows, size = logits.shape[:2]
    block = masked_block(jnp.ones(rows, bool), jnp.full(rows, size, jnp.int32), size, mask_id)
    rules = Diffusion(Sampler(), Unmasking(jnp.full(rows, NEVER), size), mask_id)
    keys = jnp.zeros((rows, size), jnp.uint32)
    return kept, refine(rules, block, logits, keys, Vocabulary(config.shards.tensor))


def context_pieces(s: Setting, tower: dict) -> Iterator[Piece]:
    """AR's step and its parts, the commit, the verification and the prefill, given the context tower's parameters, as
    `two_tower` has them.
    """
    c, size, weights = s.config, s.block_size, tower["tower"]
    one, every = np.float32(1), s.all_of(size)

    def work(
        length: int, context: int, choices: Choices, tokens: np.ndarray, hidden: bool
    ) -> tuple[Work, float | None]:
        experts = together(choices, s.rows)
        made = Pass(s.rows, length, context, experts, len(np.unique(tokens)), hidden=hidden)
        return limits.of_pass(c, weights, made), _mean(experts)

    last = s.read.tokens[: s.rows, s.context - 1]
    step, experts = work(1, s.context, s.read.token_choices, last, hidden=True)
    step += limits.of_head(c, tower["head"], s.rows)
    yield Piece("AR step", "context", write, s.slots("ar"), (one,), {"tokens": size}, step, size, experts)
    block = s.read.block_choices[:, -1:]
    done, experts = work(size, s.context, block, s.block, hidden=False)
    yield Piece("commit", "context", commit, s.slots("diffusion"), (s.block, every), {}, done, experts=experts)
    done, experts = work(size, s.context, block, s.block, hidden=True)
    done += limits.of_head(c, tower["head"], s.rows * size)
    yield Piece("verify", "context", verify, s.slots("verified"), (s.block, every), {}, done, experts=experts)
    width = min(piece_of(s.rows, s.context), s.context)
    pieces = s.read.block_choices[:, : s.context // size][:, -(width // size) :]
    start, tokens = s.context - width, s.read.tokens[: s.rows, s.context - width : s.context]
    done, experts = work(width, start, pieces.any(1, keepdims=True), tokens, hidden=False)
    arrays = (tokens, s.all_of(width))
    name = f"prefill, {width} tokens"
    yield Piece(name, "context", prefill, s.slots("diffusion", start), arrays, {}, done, experts=experts)
    for length in (1, size):
        logits = limits.of_logits(c, s.rows * length)
        hidden = np.random.default_rng(0).standard_normal((s.rows, length, c.hidden_size), np.float32).astype(s.dtype)
        work_of_head = limits.of_head(c, tower["head"], s.rows * length) + Work(hidden.nbytes + logits.bytes)
        yield Piece(f"head, {_positions(length)}", "context", head, (), (hidden,), {}, work_of_head)
    yield Piece("sampler", None, sample, (), (_logits(s, 1),), {}, limits.of_logits(c, s.rows))


def denoiser_pieces(s: Setting, tower: dict, choices: Choices) -> Iterator[Piece]:
    """The denoiser's pass, and what its logits make of a block.

    Args:
      s: the rows.
      tower: the denoiser's parameters.
      choices: see `rows.denoised`.
    """
    c, size = s.config, s.block_size
    experts = together(choices, s.rows)
    vocabulary = 1  # of the tokens at least the mask's
    made = Pass(s.rows, size, s.context, experts, vocabulary, causal=False, writes=False)
    done = limits.of_pass(c, tower["tower"], made) + limits.of_time_conditioning(c, tower["time"], s.rows)
    done += limits.of_head(c, tower["head"], s.rows * (size + 1) / 2)  # on the mean as many are masked
    arrays = (np.float32(1), np.int32(s.mask_id))
    slots = s.slots("diffusion")
    yield Piece("denoiser pass", "denoiser", denoise, slots, arrays, {}, done, size, _mean(experts))
    logits, sizes = limits.of_logits(c, s.rows * size), {"mask_id": s.mask_id}
    yield Piece("refine", None, refined, (), (_logits(s, size),), sizes, logits)


def _mean(experts: np.ndarray) -> float | None:
    return float(experts.mean()) if len(experts) else None


def _positions(length: int) -> str:
    return f"{length} position{'s' * (length > 1)}"


def _logits(s: Setting, length: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((s.rows, length, s.config.vocab_size), np.float32)


def timed(piece: Piece, group: Group, params: dict) -> Timed:
    """Compiles a piece and times it.

    Args:
      piece: what.
      group: where.
      params: with its tower's.
    """
    own = {piece.tower: params[piece.tower]} if piece.tower else {}
    kept, *arrays = group.put((piece.kept, *piece.arrays), WHOLE)
    program = Program(piece.function, (WHOLE,) * (2 + len(arrays)), (WHOLE, WHOLE), donated=(1,))
    start = time.perf_counter()
    compiled = program.on(group, **piece.sizes).lower(own, kept, *arrays).compile()
    compile_seconds = time.perf_counter() - start

    def once() -> Any:
        nonlocal kept
        kept, rest = compiled(own, kept, *arrays)
        return kept, rest

    took = seconds(once)
    analysis = compiled.memory_analysis()
    for leaf in jax.tree.leaves((kept, arrays)):
        leaf.delete()
    each = Seconds(took.median / piece.count, took.least / piece.count)
    return Timed(each, compile_seconds, None if analysis is None else analysis.temp_size_in_bytes)

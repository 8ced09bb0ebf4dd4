"""The pieces of decoding, each a program as the engine has it, on rows that have read a context.

A program gives back the state that it was given in the same memory, as long as it was, so that every call begins at the
same length.
"""

import dataclasses
import functools
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
from twotower_jax.programs import Program, Programs
from twotower_jax.shapes import Shapes
from twotower_jax.sharding import WHOLE

GREEDY, THRESHOLD = Kinds(), Kinds(rules=("threshold",))
NEVER = 1.0  # a threshold that no probability is above: every pass commits what the number of passes asks
FOREVER = 2**20  # tokens: no row ends in a benchmark


@dataclasses.dataclass(frozen=True)
class Given:
    """What a piece is timed on.

    Attributes:
      kept: what it gives back.
      arrays: the others.
      work: of doing it once.
      experts: different experts of a layer that are read, the mean over the layers; None if none are.
    """

    kept: Any
    arrays: tuple
    work: Work
    experts: float | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """A program that is timed.

    Attributes:
      name: in the table.
      rows: B.
      tower: whose parameters it takes, or None.
      function: called with dimensions, parameters, what it gives back (donated), other arrays, and sizes; gives what it
        gives back and the rest of what it made, all of it, so that no work is left out.
      shapes: of what it gives back, and of the other arrays.
      given: makes them, on the host, of rows that were read.
      sizes: what else it is compiled for.
      count: how often a call does what is timed.
    """

    name: str
    rows: int
    tower: str | None
    function: Callable
    shapes: tuple
    given: Callable[[ReadRows], Given]
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)
    count: int = 1

    @property
    def program(self) -> Program:
        return Program(self.function, (WHOLE,) * (1 + len(self.shapes)), (WHOLE, WHOLE), donated=(1,))

    @property
    def home(self) -> str:
        """The tower that must be there; for what needs none, the context's."""
        return self.tower or "context"

    def own(self, params: dict) -> dict:
        """Those parameters, of all or their shapes, that it takes."""
        return {self.tower: params[self.tower]} if self.tower else {}


@dataclasses.dataclass(frozen=True)
class Timed:
    """How long a piece took.

    Attributes:
      seconds: of doing it once.
      compile_seconds: of its program, beside others.
      temporary_bytes: that its program needs beside what it takes and gives; None where the compiler does not say.
    """

    seconds: Seconds
    compile_seconds: float
    temporary_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Setting:
    """Rows at a stated length.

    Attributes:
      config, dtype: the model's dimensions, and what it computes in.
      rows: B.
      context: tokens that each has read.
      capacity: positions of a row's state.
      block_size: S.
      mask_id: the token that stands for a masked position.
    """

    config: Config
    dtype: np.dtype
    rows: int
    context: int
    capacity: int
    block_size: int
    mask_id: int

    def empty(self) -> Slots:
        """The shapes of the rows."""
        sizes = self.rows, self.capacity, self.block_size, self.dtype
        return jax.eval_shape(lambda: empty_slots(self.config, *sizes))

    def slots(self, read: ReadRows, mode: str, length: int | None = None) -> Slots:
        """Rows of a mode that are being written, on the host; as long as they have read, unless it is said."""
        asked = {"mode": mode, "max_new_tokens": FOREVER, "block_size": self.block_size, "draft_passes": 1}
        asked |= {"steps_per_block": self.block_size, "confidence_threshold": NEVER}
        prompts = read.tokens[: self.rows, : self.context]
        requests = [Request(i, p, **asked).checked(self.config.vocab_size, True) for i, p in enumerate(prompts)]
        state = read.batch(self.rows)
        empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.empty().replace(state=None))
        state = state.replace(length=self.all_of(self.context if length is None else length))
        return empty.replace(rows=as_rows(requests, range(self.rows)), state=state)

    def block(self, read: ReadRows) -> np.ndarray:
        """(rows, S) int32: what comes after the context."""
        return read.tokens[: self.rows, self.context :]

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
    """AR's step and its parts, the commit, the verification and the prefill, given the context tower's parameters, or
    their shapes, as `two_tower` has them.
    """
    c, size, weights = s.config, s.block_size, tower["tower"]
    one, every = np.float32(1), s.all_of(size)

    def work(
        length: int, context: int, choices: Choices, tokens: np.ndarray, hidden: bool
    ) -> tuple[Work, float | None]:
        experts = together(choices, s.rows)
        made = Pass(s.rows, length, context, experts, len(np.unique(tokens)), hidden=hidden)
        return limits.of_pass(c, weights, made), _mean(experts)

    def step(read: ReadRows) -> Given:
        last = read.tokens[: s.rows, s.context - 1]
        done, experts = work(1, s.context, read.token_choices, last, hidden=True)
        return Given(s.slots(read, "ar"), (one,), done + limits.of_head(c, tower["head"], s.rows), experts)

    def committed(read: ReadRows) -> Given:
        done, experts = work(size, s.context, read.block_choices[:, -1:], s.block(read), hidden=False)
        return Given(s.slots(read, "diffusion"), (s.block(read), every), done, experts)

    def verified(read: ReadRows) -> Given:
        done, experts = work(size, s.context, read.block_choices[:, -1:], s.block(read), hidden=True)
        done += limits.of_head(c, tower["head"], s.rows * size)
        return Given(s.slots(read, "verified"), (s.block(read), every), done, experts)

    width = min(piece_of(s.rows, s.context), s.context)

    def prefilled(read: ReadRows) -> Given:
        pieces = read.block_choices[:, : s.context // size][:, -(width // size) :]
        start, tokens = s.context - width, read.tokens[: s.rows, s.context - width : s.context]
        done, experts = work(width, start, pieces.any(1, keepdims=True), tokens, hidden=False)
        return Given(s.slots(read, "diffusion", start), (tokens, s.all_of(width)), done, experts)

    def headed(length: int) -> Given:
        hidden = np.random.default_rng(0).standard_normal((s.rows, length, c.hidden_size), np.float32).astype(s.dtype)
        moved = Work(hidden.nbytes + limits.of_logits(c, s.rows * length).bytes)
        return Given((), (hidden,), limits.of_head(c, tower["head"], s.rows * length) + moved)

    slots, block = s.empty(), _shape((s.rows, size), np.int32)
    part, count = _shape((s.rows, width), np.int32), _shape((s.rows,), np.int32)
    yield Piece("AR step", s.rows, "context", write, (slots, one), step, {"tokens": size}, size)
    yield Piece("commit", s.rows, "context", commit, (slots, block, count), committed)
    yield Piece("verify", s.rows, "context", verify, (slots, block, count), verified)
    yield Piece(f"prefill, {width} tokens", s.rows, "context", prefill, (slots, part, count), prefilled)
    for length in (1, size):
        shapes = (), _shape((s.rows, length, c.hidden_size), s.dtype)
        given = functools.partial(lambda length, read: headed(length), length)
        yield Piece(f"head, {_positions(length)}", s.rows, "context", head, shapes, given)
    yield _of_logits("sampler", s, 1, sample)


def denoiser_pieces(s: Setting, tower: dict) -> Iterator[Piece]:
    """The denoiser's pass, and what its logits make of a block, given its parameters or their shapes."""
    c, size = s.config, s.block_size
    numbers = np.float32(1), np.int32(s.mask_id)

    def passed(read: ReadRows) -> Given:
        experts = together(read.pass_choices, s.rows)
        vocabulary = 1  # of the tokens at least the mask's
        made = Pass(s.rows, size, s.context, experts, vocabulary, causal=False, writes=False)
        done = limits.of_pass(c, tower["tower"], made) + limits.of_time_conditioning(c, tower["time"], s.rows)
        done += limits.of_head(c, tower["head"], s.rows * (size + 1) / 2)  # on the mean as many are masked
        return Given(s.slots(read, "diffusion"), numbers, done, _mean(experts))

    yield Piece("denoiser pass", s.rows, "denoiser", denoise, (s.empty(), *numbers), passed, count=size)
    yield _of_logits("refine", s, size, refined, mask_id=s.mask_id)


def _of_logits(name: str, s: Setting, length: int, function: Callable, **sizes: Any) -> Piece:
    shape = s.rows, length, s.config.vocab_size

    def given(read: ReadRows) -> Given:
        logits = np.random.default_rng(0).standard_normal(shape, np.float32)
        return Given((), (logits,), limits.of_logits(s.config, s.rows * length))

    return Piece(name, s.rows, None, function, ((), _shape(shape, np.float32)), given, sizes)


def _shape(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _mean(experts: np.ndarray) -> float | None:
    return float(experts.mean()) if len(experts) else None


def _positions(length: int) -> str:
    return f"{length} position{'s' * (length > 1)}"


def begin(piece: Piece, programs: Programs, group: Group, params: dict) -> None:
    """Has a piece begin to compile.

    Args:
      piece: what.
      programs: that are compiled.
      group: where.
      params: the shapes of its tower's.
    """
    shapes = Shapes.like(group).put((piece.own(params), *piece.shapes), WHOLE)
    programs.ahead(group, piece.program, *shapes, **piece.sizes)


def timed(piece: Piece, given: Given, programs: Programs, group: Group, params: dict) -> Timed:
    """Times a piece, which is compiled first unless that was begun before.

    Args:
      piece, programs, group: see `begin`.
      given: what it is timed on.
      params: with its tower's.
    """
    own = piece.own(params)
    kept, *arrays = group.put((given.kept, *given.arrays), WHOLE)
    compiled = programs.take(group, piece.program, own, kept, *arrays, **piece.sizes)
    programs.finish()

    def once() -> Any:
        nonlocal kept
        kept, rest = compiled.call(own, kept, *arrays)
        return kept, rest

    took = seconds(once)
    analysis = compiled.call.memory_analysis()
    for leaf in jax.tree.leaves((kept, arrays)):
        leaf.delete()
    each = Seconds(took.median / piece.count, took.least / piece.count)
    return Timed(each, compiled.seconds, None if analysis is None else analysis.temp_size_in_bytes)

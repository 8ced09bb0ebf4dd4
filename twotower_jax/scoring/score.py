"""Scores of pairs of a context and its continuation."""

import dataclasses
import itertools
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twotower_jax import distributed, inputs, sharding, two_tower
from twotower_jax.engine import sizes
from twotower_jax.errors import InputError, short
from twotower_jax.placement import Towers
from twotower_jax.programs import Program, Programs
from twotower_jax.scoring import bound, passes
from twotower_jax.scoring.passes import TOGETHER, Answers, Blocks, Pieces, Questions
from twotower_jax.scoring.pieces import WIDTH, Order, Reading, Tree, capacity_of
from twotower_jax.sharding import ROWS, WHOLE
from twotower_jax.state import empty_state, state_bytes

ROWS_AT_ONCE = two_tower.PREFILL_TOKENS // WIDTH
BROKEN = "a logit was not finite"


@dataclasses.dataclass(frozen=True)
class Scores:
    """What `Model.score` found, a list entry a pair; None stands where there is an error.

    Attributes:
      logprobs: log p(continuation | context), natural; by the denoiser a lower bound on it.
      greedy: whether every token of the continuation is the most probable one, of equals the first; None by the
        denoiser.
      standard_errors: of the bound's estimate; None by the context tower.
      per_token: each token's part of `logprobs`; None unless asked for.
      errors: None, or why there is no score.
      tokens_read: by the context tower, of all pairs together.
      seconds: without compilation.
      compile_seconds: 0 if the programs were there already.
    """

    logprobs: list[float | None]
    greedy: list[bool | None] | None
    standard_errors: list[float | None] | None
    per_token: list[list[float] | None] | None
    errors: list[str | None]
    tokens_read: int
    seconds: float
    compile_seconds: float


@dataclasses.dataclass(eq=False)
class Pair:
    """A pair, and what is known of it.

    Attributes:
      context, continuation: int32.
      logprobs: each token's, (n,).
      greedy: whether all so far were the most probable.
      variance: of the sum of `logprobs`.
      broken: whether a logit was not finite.
    """

    context: np.ndarray
    continuation: np.ndarray
    logprobs: np.ndarray
    greedy: bool = True
    variance: float = 0.0
    broken: bool = False


@dataclasses.dataclass(frozen=True)
class _Block:
    """A block of a pair's continuation, from `start` on."""

    pair: Pair
    start: int
    tokens: np.ndarray
    masks: np.ndarray


def checked_pairs(pairs: Any, vocab_size: int) -> list[Pair]:
    """Pairs as they were given.

    Raises:
      InputError: one of them is no pair of token-id lists.
    """
    if isinstance(pairs, str | bytes) or not isinstance(pairs, Iterable):
        raise InputError(f"pairs must be a list of (context ids, continuation ids), not {short(pairs)}")
    found = []
    for i, pair in enumerate(pairs):
        if isinstance(pair, str | bytes) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise InputError(f"pair {i} must be (context ids, continuation ids), not {short(pair)}")
        context, continuation = (
            inputs.token_ids(f"pair {i}'s {name}", ids, vocab_size)
            for name, ids in zip(("context", "continuation"), pair, strict=True)
        )
        found.append(Pair(context, continuation, np.zeros(len(continuation))))
    return found


def score(
    towers: Towers,
    programs: Programs,
    params: dict,
    pairs: Sequence[Pair],
    *,
    by: str,
    per_token: bool,
    samples: int,
    block_size: int,
    mask_token_id: int,
    seed: int,
) -> Scores:
    """See `Model.score`; everything is checked."""
    compiled, start = programs.compile_seconds, time.perf_counter()
    tokens_read = 0
    if pairs:
        longest = max(len(pair.context) + len(pair.continuation) for pair in pairs)
        scorer = _Scorer(towers, programs, params, capacity_of(longest), block_size, mask_token_id)
        order = sorted(pairs, key=lambda pair: (*pair.context.tolist(), -1, *pair.continuation.tolist()))
        share = -(-len(order) // scorer.shards)
        shares = [order[i * share : (i + 1) * share] for i in range(scorer.shards)]
        if by == "context":
            trees = [_asked_of_context(pairs, scorer.most) for pairs in shares]
        else:
            trees = [_asked_of_denoiser(pairs, scorer.most, block_size, samples, seed) for pairs in shares]
        tokens_read = scorer.run(trees)
    compile_seconds = programs.compile_seconds - compiled

    def of_each(value):
        return [None if pair.broken else value(pair) for pair in pairs]

    return Scores(
        logprobs=of_each(lambda pair: math.fsum(pair.logprobs)),
        greedy=of_each(lambda pair: pair.greedy) if by == "context" else None,
        standard_errors=of_each(lambda pair: math.sqrt(pair.variance)) if by == "denoiser" else None,
        per_token=of_each(lambda pair: pair.logprobs.tolist()) if per_token else None,
        errors=[BROKEN if pair.broken else None for pair in pairs],
        tokens_read=tokens_read,
        seconds=time.perf_counter() - start - compile_seconds,
        compile_seconds=compile_seconds,
    )


def _asked_of_context(pairs: Sequence[Pair], most: int) -> Tree:
    """All tokens but each pair's last are read, and of those from the context's last one on it is asked what follows."""
    tree = Tree(most)
    for pair in pairs:
        tokens = np.concatenate([pair.context, pair.continuation])
        first = len(pair.context) - 1
        for piece in tree.add(tokens[:-1]):
            begin = piece.end - len(piece.tokens)
            for at in range(max(begin, first), piece.end):
                piece.asked.append((at - begin, int(tokens[at + 1]), (pair, at - first)))
    return tree


def _asked_of_denoiser(pairs: Sequence[Pair], most: int, block_size: int, samples: int, seed: int) -> Tree:
    """All tokens before each pair's last block are read, and after those before a block it is denoised."""
    tree = Tree(most)
    for pair in pairs:
        tokens = np.concatenate([pair.context, pair.continuation])
        starts = range(len(pair.context), len(tokens), block_size)
        pieces = {piece.end: piece for piece in tree.add(tokens[: starts[-1]], starts[:-1])}
        for number, start in enumerate(starts):
            own = tokens[start : start + block_size]
            masks = bound.draw_masks(seed, pair.context, number, len(own), samples)
            pieces[start].blocks.append(_Block(pair, start - starts[0], own, masks))
    return tree


class _Scorer:
    """States on the devices, and the passes that go on from them.

    Attributes:
      shards: parts of the rows, each of which has states of its own.
      most: what can be asked in a pass of one of them.
    """

    def __init__(
        self, towers: Towers, programs: Programs, params: dict, capacity: int, block_size: int, mask_token_id: int
    ):
        self._towers, self._programs = towers, programs
        self._group = group = towers.context
        self.shards = group.row_shards
        dtype = two_tower.dtype_of(params)
        self._rows = rows = _rows(towers, capacity, dtype)
        self._held_rows = 2 * rows
        self._block = sizes.block_of(block_size)
        self.most = -(-rows * max(WIDTH, self._block) // TOGETHER) * TOGETHER
        self._what = f"scoring {rows * self.shards} pieces of texts of up to {capacity} tokens"
        states = sharding.state_spec(group.whole)
        self._states = states
        self._context = {"context": params["context"]}
        context = sharding.specs(group.whole, "context")
        self._read = Program(passes.read, (context, states, ROWS, ROWS, WHOLE), (states, ROWS), donated=(1,))
        self._take = Program(passes.take, (states, ROWS), states)
        if "denoiser" in params:
            self._denoiser = {"denoiser": params["denoiser"]}
            denoiser = sharding.specs(group.whole, "denoiser")
            self._denoise = Program(passes.denoise, (denoiser, states, ROWS, ROWS, WHOLE, WHOLE), ROWS)
            self._mask_id = towers.denoiser.put(np.int32(mask_token_id), WHOLE)
        empty = Program(empty_state, (), states)
        self._held = self._run(group, empty, rows=self._held_rows, capacity=capacity, dtype=dtype)

    def _run(self, group, program: Program, *arrays: Any, **sizes: Any) -> Any:
        return self._programs.run(group, program, *arrays, what=self._what, **sizes)

    def run(self, trees: Sequence[Tree]) -> int:
        """Reads what there is to read, a tree for each shard, and tells the pairs; how many tokens it were."""
        orders = [Order(tree.first, self._held_rows) for tree in trees]
        tokens = 0
        heard: deque = deque()
        while capacity := next((c for c in (order.capacity() for order in orders) if c is not None), None):
            taken = [order.take(self._rows, capacity, self.most) for order in orders]
            tokens += sum(len(reading.piece.tokens) for own in taken for reading in own)
            heard.append(self._pieces(taken, capacity))
            if len(heard) > 1:  # a pass late, so that the devices need not wait
                _tell(*heard.popleft(), self._group)
            self._blocks([[reading.piece for reading in own if not reading.again] for own in taken], orders, capacity)
        for found in heard:
            _tell(*found, self._group)
        return tokens

    def _pieces(self, taken: list[list[Reading]], capacity: int) -> tuple[list, Answers]:
        """Starts a pass over pieces; who asked, and the answers on the devices."""
        places, width = len(taken) * self._rows, WIDTH
        pieces = Pieces(
            source=np.zeros(places, np.int32),
            fresh=np.ones(places, bool),
            target=np.full(places, self._held_rows, np.int32),
            tokens=np.zeros((places, width), np.int32),
            count=np.zeros(places, np.int32),
        )
        asked: list[list[tuple[int, int, Any]]] = [[] for _ in taken]
        for shard, own in enumerate(taken):
            for i, reading in enumerate(own):
                at, tokens = shard * self._rows + i, reading.piece.tokens
                pieces.tokens[at, : len(tokens)], pieces.count[at] = tokens, len(tokens)
                if reading.source is not None:
                    pieces.source[at], pieces.fresh[at] = reading.source, False
                if reading.target is not None:
                    pieces.target[at] = reading.target
                if not reading.again:
                    asked[shard] += [(i * width + place, token, whose) for place, token, whose in reading.piece.asked]
        questions, turns, whose = self._questions(asked)
        put = self._group.put
        arrays = (put(pieces, ROWS), put(questions, ROWS), put(turns, WHOLE))
        self._held, answers = self._run(self._group, self._read, self._context, self._held, *arrays, capacity=capacity)
        return whose, answers

    def _questions(self, asked: list[list[tuple[int, int, Any]]]) -> tuple[Questions, np.int32, list]:
        """Each shard's questions as arrays, and who asked them, by their place there."""
        place, token = (np.zeros((len(asked), self.most), np.int32) for _ in range(2))
        whose = []
        for shard, own in enumerate(asked):
            for i, (at, follows, who) in enumerate(own):
                place[shard, i], token[shard, i] = at, follows
                whose.append((shard * self.most + i, who))
        turns = np.int32(-(-max(map(len, asked)) // TOGETHER))
        return Questions(place.reshape(-1), token.reshape(-1)), turns, whose

    def _blocks(self, pieces: list[list], orders: Sequence[Order], capacity: int) -> None:
        """Denoises what is to be denoised after pieces that were just read."""
        waiting = [[(piece, block) for piece in own for block in piece.blocks] for own in pieces]
        for begin in range(0, max(map(len, waiting)), self._rows):
            batch = [own[begin : begin + self._rows] for own in waiting]
            self._denoised(batch, capacity)
            for order, own in zip(orders, batch, strict=True):
                for piece, _ in own:
                    order.used(piece)

    def _denoised(self, batch: list[list[tuple[Any, _Block]]], capacity: int) -> None:
        """All samples of some blocks."""
        group, places = self._towers.denoiser, len(batch) * self._rows
        rows = np.zeros(places, np.int32)
        blocks = Blocks(
            tokens=np.zeros((places, self._block), np.int32),
            masked=np.zeros((places, self._block), bool),
            size=np.ones(places, np.int32),
        )
        placed = []
        for shard, own in enumerate(batch):
            for i, (piece, block) in enumerate(own):
                at, size = shard * self._rows + i, len(block.tokens)
                rows[at], blocks.size[at] = piece.row, size
                blocks.tokens[at, :size] = block.tokens
                placed.append((shard, i, block))
        state = self._run(self._group, self._take, self._held, self._group.put(rows, ROWS), capacity=capacity)
        if self._towers.split:
            state = self._towers.move(state, self._states, group)
        samples = len(placed[0][2].masks)
        heard = []
        for sample in range(samples):
            asked: list[list[tuple[int, int, Any]]] = [[] for _ in batch]
            masked = np.zeros_like(blocks.masked)
            for shard, i, block in placed:
                mask = block.masks[sample]
                masked[shard * self._rows + i, : len(mask)] = mask
                asked[shard] += [
                    (i * self._block + int(p), int(block.tokens[p]), (block, sample, p)) for p in np.flatnonzero(mask)
                ]
            questions, turns, whose = self._questions(asked)
            arrays = (group.put(blocks.replace(masked=masked), ROWS), group.put(questions, ROWS))
            answers = self._run(
                group, self._denoise, self._denoiser, state, *arrays, group.put(turns, WHOLE), self._mask_id
            )
            heard.append((whose, answers))
        found = {id(block): np.zeros(block.masks.shape) for _, _, block in placed}
        for whose, answers in heard:
            answers = group.fetch(answers)
            for at, (block, sample, place) in whose:
                found[id(block)][sample, place] = answers.logprob[at]
                block.pair.broken |= bool(answers.broken[at])
        for _, _, block in placed:
            shares, variance = bound.estimate(block.masks, found[id(block)])
            block.pair.logprobs[block.start : block.start + len(shares)] = shares
            block.pair.variance += variance


def _tell(whose: list, answers: Answers, group) -> None:
    """The pairs what the context tower answered."""
    answers = group.fetch(answers)
    for at, (pair, place) in whose:
        pair.logprobs[place] = answers.logprob[at]
        pair.greedy &= bool(answers.best[at])
        pair.broken |= bool(answers.broken[at])


def _rows(towers: Towers, capacity: int, dtype: jnp.dtype) -> int:
    """Pieces of a pass on one device, a power of two; there are states of four times as many."""
    c = towers.context.config

    def needed(rows: int) -> int:
        return state_bytes(c, 4 * rows, capacity, dtype) + 12 * TOGETHER * c.vocab_size

    fit, free = sizes.most_rows(towers, needed)
    if fit < 1 or capacity >= 2**31:
        numbers = (
            f"{needed(1) / 1e9:.3g} GB for texts of up to {capacity} tokens, {free / 1e9:.3g} GB of a device to use"
        )
        raise InputError(f"not one text fits: {numbers}")
    most = min(fit, ROWS_AT_ONCE, sizes.SLOTS.get(jax.default_backend(), ROWS_AT_ONCE))
    return 1 << (most.bit_length() - 1)

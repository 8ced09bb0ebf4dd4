"""States on the devices, and the passes that go on from them, as the host starts and hears them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twotower_jax import sharding, two_tower
from twotower_jax.engine import sizes
from twotower_jax.errors import InputError
from twotower_jax.placement import Group, Towers
from twotower_jax.programs import Program, Programs
from twotower_jax.scoring import passes
from twotower_jax.scoring.bound import Bound, estimate
from twotower_jax.scoring.pairs import Part
from twotower_jax.scoring.passes import TOGETHER, Answers, Blocks, Pieces, Questions
from twotower_jax.scoring.pieces import WIDTH, Order, Piece, Reading, Tree, capacity_of
from twotower_jax.sharding import ROWS, WHOLE
from twotower_jax.state import empty_state, state_bytes

AT_ONCE = two_tower.PREFILL_TOKENS // WIDTH  # pieces of a pass, on one device


class Scorer:
    """Reads trees of pieces, one for each part of the rows, and tells pairs what they asked.

    All passes have the same shape, however little there is to read: a score does not depend on how many there are.

    Attributes:
      shards: parts of the rows.
      most: what can be asked in a pass of one of them.
    """

    def __init__(
        self, towers: Towers, programs: Programs, params: dict, longest: int, block_size: int, bound: Bound | None
    ):
        self._towers, self._programs, self._bound = towers, programs, bound
        self._context = group = towers.context
        self.shards, dtype, capacity = group.row_shards, two_tower.dtype_of(params), capacity_of(longest)
        self._rows = rows = _rows(towers, capacity, dtype)
        self._held_rows = 2 * rows
        self._size = sizes.block_of(block_size)
        self.most = -(-rows * max(WIDTH, self._size) // TOGETHER) * TOGETHER
        self._what = f"{rows * self.shards} pieces of texts of up to {capacity} tokens"
        self._params = {tower: {tower: params[tower]} for tower in params}
        self._states = states = sharding.state_spec(group.whole)
        specs = {tower: sharding.specs(group.whole, tower) for tower in params}
        asked = (ROWS, ROWS, WHOLE)  # rows, questions and turns
        self._read = Program(passes.read, (specs["context"], states, *asked), (states, ROWS), donated=(1,))
        if bound is not None:
            self._take = Program(passes.take, (states, ROWS), states)
            self._denoise = Program(passes.denoise, (specs["denoiser"], states, *asked, WHOLE), ROWS)
            self._mask_id = towers.denoiser.put(np.int32(bound.mask_id), WHOLE)
        held = Program(empty_state, (), states)
        self._held = self._run(group, held, rows=self._held_rows, capacity=capacity, dtype=dtype)

    def _run(self, group: Group, program: Program, *arrays: Any, **sizes: Any) -> Any:
        return self._programs.run(group, program, *arrays, what=self._what, **sizes)

    def read(self, trees: Sequence[Tree]) -> int:
        """Reads all there is to read; how many tokens that were."""
        tokens = 0
        for taken, answers in _a_turn_late(self._passes([Order(tree.first, self._held_rows) for tree in trees])):
            tokens += sum(len(reading.piece.tokens) for own in taken for reading in own)
            answers = self._context.fetch(answers)
            for shard, own in enumerate(taken):
                at = shard * self.most
                for pair, place in (who for reading in own if not reading.again for _, _, who in reading.piece.asked):
                    pair.logprobs[place] = answers.logprob[at]
                    pair.greedy &= bool(answers.best[at])
                    pair.broken |= bool(answers.broken[at])
                    at += 1
        return tokens

    def _passes(self, orders: Sequence[Order]) -> Iterator[tuple[list[list[Reading]], Answers]]:
        """Starts passes over pieces, with what is to be denoised after them; what was read, and the answers there."""
        while capacity := next(filter(None, (order.capacity() for order in orders)), None):
            taken = [order.take(self._rows, capacity, self.most) for order in orders]
            yield taken, self._start(taken, capacity)
            waiting = [[(r.piece, part) for r in own if not r.again for part in r.piece.blocks] for own in taken]
            for begin in range(0, max(map(len, waiting)), self._rows):
                batch = [own[begin : begin + self._rows] for own in waiting]
                self._denoised(batch, capacity)
                for order, own in zip(orders, batch, strict=True):
                    for piece, _ in own:
                        order.used(piece)

    def _start(self, taken: list[list[Reading]], capacity: int) -> Answers:
        count = len(taken) * self._rows
        pieces = Pieces(
            source=np.zeros(count, np.int32),
            fresh=np.ones(count, bool),
            target=np.full(count, self._held_rows, np.int32),
            tokens=np.zeros((count, WIDTH), np.int32),
            count=np.zeros(count, np.int32),
        )
        asked: list[list[tuple[int, int]]] = [[] for _ in taken]
        for shard, own in enumerate(taken):
            for i, reading in enumerate(own):
                at, tokens = shard * self._rows + i, reading.piece.tokens
                pieces.tokens[at, : len(tokens)], pieces.count[at] = tokens, len(tokens)
                if reading.source is not None:
                    pieces.source[at], pieces.fresh[at] = reading.source, False
                if reading.target is not None:
                    pieces.target[at] = reading.target
                if not reading.again:
                    asked[shard] += [(i * WIDTH + place, token) for place, token, _ in reading.piece.asked]
        arrays = self._asked(self._context, pieces, [np.array(own, np.int32).reshape(-1, 2).T for own in asked])
        context = self._params["context"]
        self._held, answers = self._run(self._context, self._read, context, self._held, *arrays, capacity=capacity)
        return answers

    def _asked(self, group: Group, rows: Pieces | Blocks, asked: list[tuple[np.ndarray, np.ndarray]]) -> tuple:
        """Rows of a pass, and each shard's questions about them (places and tokens), on the devices."""
        place, token = np.zeros((2, len(asked), self.most), np.int32)
        for shard, (places, tokens) in enumerate(asked):
            place[shard, : len(places)], token[shard, : len(tokens)] = places, tokens
        turns = np.int32(-(-max(len(places) for places, _ in asked) // TOGETHER))
        questions = Questions(place.reshape(-1), token.reshape(-1))
        return group.put(rows, ROWS), group.put(questions, ROWS), group.put(turns, WHOLE)

    def _denoised(self, batch: list[list[tuple[Piece, Part]]], capacity: int) -> None:
        """Tells some parts' pairs the estimate, of as many samples as the bound has; each stands after a piece."""
        shape = (len(batch) * self._rows, self._size)
        rows, size = np.zeros(shape[0], np.int32), np.ones(shape[0], np.int32)
        tokens, masks = np.zeros(shape, np.int32), np.zeros((self._bound.samples, *shape), bool)
        parts: dict[int, Part] = {}
        for shard, own in enumerate(batch):
            for at, (piece, part) in enumerate(own, shard * self._rows):
                n = len(part.tokens)
                rows[at], size[at], tokens[at, :n] = piece.row, n, part.tokens
                masks[:, at, :n] = self._bound.masks(part.pair.context, part.number, n)
                parts[at] = part
        state = self._run(self._context, self._take, self._held, self._context.put(rows, ROWS), capacity=capacity)
        if self._towers.split:
            state = self._towers.move(state, self._states, self._towers.denoiser)
        logprobs, broken = np.zeros(masks.shape), np.zeros(shape, bool)
        for sample, asked, answers in _a_turn_late(self._samples(state, tokens, masks, size, len(batch))):
            answers = self._towers.denoiser.fetch(answers)
            for shard, (places, _) in enumerate(asked):
                own, first = slice(shard * self._rows, (shard + 1) * self._rows), shard * self.most
                answered = slice(first, first + len(places))
                logprobs[sample, own].reshape(-1)[places] = answers.logprob[answered]
                broken[own].reshape(-1)[places] |= answers.broken[answered]
        for at, part in parts.items():
            n, pair = len(part.tokens), part.pair
            pair.logprobs[part.place], variance = estimate(masks[:, at, :n], logprobs[:, at, :n])
            pair.variance += variance
            pair.broken |= bool(broken[at].any())

    def _samples(
        self, state: Any, tokens: np.ndarray, masks: np.ndarray, size: np.ndarray, shards: int
    ) -> Iterator[tuple[int, list[tuple[np.ndarray, np.ndarray]], Answers]]:
        """Starts a pass of the denoiser for each sample; what is asked of each shard, and the answers there."""
        group, denoiser = self._towers.denoiser, self._params["denoiser"]
        for sample, masked in enumerate(masks):
            places = [np.flatnonzero(own) for own in np.split(masked, shards)]
            asked = [(at, own.reshape(-1)[at]) for at, own in zip(places, np.split(tokens, shards), strict=True)]
            arrays = self._asked(group, Blocks(tokens, masked, size), asked)
            yield sample, asked, self._run(group, self._denoise, denoiser, state, *arrays, self._mask_id)


def _a_turn_late(started: Iterable[tuple]) -> Iterator[tuple]:
    """What was started, each when the next one is: the devices need not wait for the host."""
    before = None
    for now in started:
        if before is not None:
            yield before
        before = now
    if before is not None:
        yield before


def _needed(towers: Towers, rows: int, capacity: int, dtype: jnp.dtype) -> int:
    """Bytes of a device: states that are held, two for each row of a pass, and those before and after the pass."""
    c = towers.context.config
    return state_bytes(c, 4 * rows, capacity, dtype) + 12 * TOGETHER * c.vocab_size


def longest(towers: Towers, dtype: jnp.dtype) -> int:
    """Tokens of the longest text that fits."""
    return sizes.fitting(towers, lambda n: _needed(towers, 1, capacity_of(n), dtype))[0]


def _rows(towers: Towers, capacity: int, dtype: jnp.dtype) -> int:
    """Pieces of a pass on one device, a power of two."""
    fit, free = sizes.fitting(towers, lambda n: _needed(towers, n, capacity, dtype))
    if fit < 1 or capacity >= 2**31:
        one = f"{_needed(towers, 1, capacity, dtype) / 1e9:.3g} GB for texts of up to {capacity} tokens"
        raise InputError(f"the longest text does not fit: {one}, {free / 1e9:.3g} GB of a device to use")
    most = min(fit, AT_ONCE, sizes.SLOTS.get(jax.default_backend(), AT_ONCE))
    return 1 << (most.bit_length() - 1)

"""Pairs of a context and its continuation, and what is read and asked to score them."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from twotower_jax import inputs
from twotower_jax.errors import InputError, short
from twotower_jax.scoring.pieces import Tree


@dataclasses.dataclass(eq=False)
class Pair:
    """A pair, and what is known of it.

    Attributes:
      context, continuation: (n,) int32.
      logprobs: each of the continuation's tokens', float64.
      greedy: whether all of them so far were the most probable.
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
class Part:
    """A block of a pair's continuation: its number, and its place there."""

    pair: Pair
    number: int
    place: slice

    @property
    def tokens(self) -> np.ndarray:
        return self.pair.continuation[self.place]


def checked(pairs: Any, vocab_size: int) -> list[Pair]:
    """The pairs that a caller gives.

    Raises:
      InputError: one of them is not two lists of token ids.
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


def in_shares(pairs: Sequence[Pair], shares: int) -> list[list[Pair]]:
    """As many lists, of about as many pairs each; those that begin alike stand together."""

    def text(pair: Pair) -> tuple[bytes, bytes]:
        return pair.context.astype(">i4").tobytes(), pair.continuation.astype(">i4").tobytes()

    order, size = sorted(pairs, key=text), -(-len(pairs) // shares)
    return [order[i * size : (i + 1) * size] for i in range(shares)]


def for_context(pairs: Sequence[Pair], most: int) -> Tree:
    """All tokens but a pair's last are read; from the context's last one on it is asked what follows."""
    tree = Tree(most)
    for pair in pairs:
        tokens, first = np.concatenate([pair.context, pair.continuation]), len(pair.context) - 1
        for piece in tree.add(tokens[:-1]):
            begin = piece.end - len(piece.tokens)
            for at in range(max(begin, first), piece.end):
                piece.asked.append((at - begin, int(tokens[at + 1]), (pair, at - first)))
    return tree


def for_denoiser(pairs: Sequence[Pair], most: int, block_size: int) -> Tree:
    """All tokens before a pair's last block are read; after those before a block it is denoised."""
    tree = Tree(most)
    for pair in pairs:
        before, size = len(pair.context), len(pair.continuation)
        starts = range(0, size, block_size)
        tokens = np.concatenate([pair.context, pair.continuation[: starts[-1]]])
        pieces = {piece.end: piece for piece in tree.add(tokens, [before + start for start in starts[:-1]])}
        for number, start in enumerate(starts):
            place = slice(start, min(start + block_size, size))
            pieces[before + start].blocks.append(Part(pair, number, place))
    return tree

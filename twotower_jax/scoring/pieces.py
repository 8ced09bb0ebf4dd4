"""What is read: sequences cut into pieces, of which those that begin alike are read once; and in which order.

A sequence is cut at multiples of `WIDTH`, whatever the others are, and its caches have a size that depends on where a
piece ends: the same sums are done for it whoever is beside it.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

WIDTH = 32  # positions of a piece at most
SHORTEST = 256  # positions of a cache


def capacity_of(end: int) -> int:
    """Positions of the caches for a piece with this end: one of few numbers, so that few programs are compiled."""
    capacity = SHORTEST
    while capacity < end:
        capacity *= 4
    return capacity


@dataclasses.dataclass(eq=False)
class Piece:
    """Tokens that are read after another piece, or at the beginning.

    Attributes:
      before: the piece before; None at the beginning.
      tokens: (n,) int32, at most `WIDTH`.
      end: positions up to its last one.
      asked: what is asked of it: a position within it, the token that follows there, and for whom.
      blocks: what is denoised after it.
      after: the pieces after it.
      row: where the state after it is held; None if it is not.
      uses: how many pieces and blocks still need that state.
    """

    before: "Piece | None"
    tokens: np.ndarray
    end: int
    asked: list[tuple[int, int, Any]] = dataclasses.field(default_factory=list)
    blocks: list[Any] = dataclasses.field(default_factory=list)
    after: list["Piece"] = dataclasses.field(default_factory=list)
    row: int | None = None
    uses: int = 0


class Tree:
    """Sequences as pieces; those that begin alike have the same ones.

    Attributes:
      first: the pieces at the beginning.
    """

    def __init__(self, most: int):
        """Of a piece no more than `most` is asked; where there is more to ask, the same tokens are read again."""
        self._most = most
        self._pieces: dict[tuple[int, bytes], Piece] = {}  # by the piece before and the tokens
        self.first: list[Piece] = []

    def add(self, tokens: np.ndarray, cuts: Sequence[int] = ()) -> list[Piece]:
        """The pieces of a sequence (L,) int32, cut at these positions too, in order."""
        path: list[Piece] = []
        for start, stop in itertools.pairwise([0, *cuts, len(tokens)]):
            for at in range(start, stop, WIDTH):
                path.append(self._piece(path[-1] if path else None, tokens[at : min(at + WIDTH, stop)]))
        return path

    def _piece(self, before: Piece | None, tokens: np.ndarray) -> Piece:
        key = (id(before), tokens.tobytes())
        piece = self._pieces.get(key)
        if piece is None or len(piece.asked) + len(tokens) > self._most:
            piece = Piece(before, tokens, (before.end if before else 0) + len(tokens))
            self._pieces[key] = piece
            (before.after if before else self.first).append(piece)
        return piece


@dataclasses.dataclass(frozen=True)
class Reading:
    """A piece in a pass.

    Attributes:
      piece: what is read.
      source: the row of the state before it; None at the beginning.
      target: the row of the state after it; None if nobody needs that.
      again: whether it was read before, and its state given up since.
    """

    piece: Piece
    source: int | None
    target: int | None
    again: bool


class Order:
    """Depth first, several pieces at a time, where two rows or more hold states.

    Where they are too few, a state is given up, and made again when its turn comes.
    """

    def __init__(self, first: Iterable[Piece], rows: int):
        self._stack = [(piece, False) for piece in reversed(list(first))]  # with whether it was read before
        self._free = list(range(rows))
        self._held: dict[Piece, None] = {}  # the oldest first

    def capacity(self) -> int | None:
        """Of the caches that the next piece needs; None if all are read."""
        if not self._stack:
            return None
        while (before := self._stack[-1][0].before) is not None and before.row is None:
            if before.before is not None:
                before.before.uses += 1
            self._stack.append((before, True))
        return capacity_of(self._stack[-1][0].end)

    def take(self, most: int, capacity: int, asked: int) -> list[Reading]:
        """The next pieces, if the very next one needs this capacity: at most so many, of which so much is asked.

        All states before them are read from their rows before one after them is written.
        """
        if self.capacity() != capacity:
            return []
        if self._stack[-1][1]:  # alone: what stands below waits for its state
            piece, _ = self._stack.pop()
            self._has_room(piece, must=True)
            return [self._read(piece, again=True)]
        taken: list[Reading] = []
        left: list[Piece] = []
        while self._stack and len(taken) < most and len(left) < most:
            piece, _ = self._stack.pop()
            fits = capacity_of(piece.end) == capacity and len(piece.asked) <= asked
            if fits and self._has_room(piece, must=not taken):
                taken.append(self._read(piece, again=False))
                asked -= len(piece.asked)
            else:
                left.append(piece)
        self._stack += [(piece, False) for piece in reversed(left)]
        for reading in reversed(taken):
            self._stack += [(piece, False) for piece in reversed(reading.piece.after)]
        return taken

    def used(self, piece: Piece) -> None:
        """One of those that needed the state after a piece has it."""
        piece.uses -= 1
        if not piece.uses:
            self._let_go(piece)

    def _has_room(self, piece: Piece, must: bool) -> bool:
        """Whether the state before is there, and a row for the one after, which is made if it `must`."""
        before = piece.before
        if before is not None and before.row is None:
            return False
        if self._free or not (piece.after or piece.blocks) or (before is not None and before.uses == 1):
            return True
        if must:
            self._let_go(next(held for held in self._held if held is not before))
        return must

    def _read(self, piece: Piece, again: bool) -> Reading:
        source = None
        if piece.before is not None:
            source = piece.before.row
            self.used(piece.before)
        if not again:
            piece.uses = len(piece.after) + len(piece.blocks)
        if piece.uses:
            piece.row = self._free.pop()
            self._held[piece] = None
        return Reading(piece, source, piece.row, again)

    def _let_go(self, piece: Piece) -> None:
        self._free.append(piece.row)
        piece.row = None
        del self._held[piece]

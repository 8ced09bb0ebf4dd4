"""Documents from files, tokenised when needed and packed into rows, each of which depends on its own position alone."""

import dataclasses
import functools
import glob
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import struct

from twotower_jax.errors import InputError


@struct.dataclass
class Batch:
    """Rows of packed documents.

    Attributes:
      tokens: (B, L) int32.
      segments: (B, L) int32, see `state.Packing`.
      targets: (B, L) bool, tokens that are to be learned; not a prompt's.
      blocks: (B, M) int32, where the blocks to be denoised begin; -1 for none.
    """

    tokens: jax.Array
    segments: jax.Array
    targets: jax.Array
    blocks: jax.Array


@dataclasses.dataclass(frozen=True)
class Document:
    """Token ids; `prompt` of them are given and not learned."""

    tokens: np.ndarray
    prompt: int


class Documents:
    """The documents of files, by number; an index of their places is all that is held.

    Args:
      patterns: of files, .jsonl or text.
      encode: text to token ids.
      eos: id that ends every document, if it does not end with it already.
      vocab_size: V.
      mask: id of [MASK], which no document may hold; None allows it.

    Raises:
      InputError: no file, an empty one, one that is not UTF-8, or a line that is not a document.
    """

    def __init__(
        self,
        patterns: tuple[str, ...],
        encode: Callable[[str], list[int]],
        eos: int,
        vocab_size: int,
        mask: int | None = None,
    ):
        self._encode, self._eos, self._vocab, self._mask = encode, eos, vocab_size, mask
        self._files: list[Path] = []
        for pattern in patterns:
            found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if not Path(name).is_dir()]
            if not found:
                raise InputError(f"data.files: {pattern} names no file")
            self._files += found
        for file in self._files:
            if file.suffix.lower() == ".json":
                raise InputError(f"{file}: give .jsonl, a record a line, or text under another name")
        places = [_places(file) for file in self._files]
        for file, found in zip(self._files, places, strict=True):
            if not len(found):
                raise InputError(f"{file} is empty: it has no document")
        self._places = np.concatenate(places)  # (n, 3): first byte, length, line
        self._file = np.repeat(np.arange(len(self._files)), [len(found) for found in places])

    def __len__(self) -> int:
        return len(self._places)

    @property
    def names(self) -> list[str]:
        """Of the files, without their folders."""
        return [file.name for file in self._files]

    def __getitem__(self, number: int) -> Document:
        file = self._files[self._file[number]]
        start, length, line = (int(x) for x in self._places[number])
        try:
            with open(file, "rb") as handle:
                handle.seek(start)
                raw = handle.read(length)
        except OSError as error:
            raise InputError(f"cannot read {file}: {error.strerror}") from None
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{file}, line {line}: not UTF-8: {error.reason} at byte {start + error.start}") from None
        text = text if start else text.removeprefix("\ufeff")  # a byte order mark
        if _is_jsonl(file):
            prompt, text = _record(text, f"{file}, line {line}")
        else:
            prompt, text = "", text.replace("\r\n", "\n")
        given = self._encode(prompt) if prompt else []
        tokens = np.asarray(given + self._encode(text), np.int64)
        if len(tokens) == 0 or tokens[-1] != self._eos:
            tokens = np.append(tokens, self._eos)
        if tokens.max() >= self._vocab:
            raise InputError(
                f"{file}, line {line}: the tokenizer gives id {tokens.max()}, the model's ids end at {self._vocab - 1}"
            )
        if self._mask in tokens:
            raise InputError(f"{file}, line {line}: holds the token of [MASK], id {self._mask}, which is not text")
        return Document(tokens.astype(np.int32), len(given))


def _is_jsonl(file: Path) -> bool:
    return file.suffix.lower() == ".jsonl"


def _places(file: Path) -> np.ndarray:
    """(n, 3): first byte, length and line number of each document: a line of .jsonl, else what empty lines part."""
    jsonl = _is_jsonl(file)
    places: list[tuple[int, int, int]] = []
    at, open_start, open_line = 0, None, 0
    try:
        with open(file, "rb") as handle:
            for number, line in enumerate(handle, start=1):
                blank = not line.strip()
                if jsonl and not blank:
                    places.append((at, len(line), number))
                elif not jsonl and blank and open_start is not None:
                    places.append((open_start, at - open_start, open_line))
                    open_start = None
                elif not jsonl and not blank and open_start is None:
                    open_start, open_line = at, number
                at += len(line)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None
    if open_start is not None:
        places.append((open_start, at - open_start, open_line))
    return np.asarray(places, np.int64).reshape(-1, 3)


def _record(line: str, where: str) -> tuple[str, str]:
    """Prompt and text of a line of JSON."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    record = record if isinstance(record, dict) else {}
    pair = record.get("prompt", ""), record.get("text", record.get("completion"))
    if not all(isinstance(part, str) for part in pair) or not any(pair) or ("text" in record) == ("prompt" in record):
        raise InputError(f'{where}: must be {{"text": "..."}} or {{"prompt": "...", "completion": "..."}}, not empty')
    try:
        "".join(pair).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: holds half of a surrogate pair, which is no character") from None
    return pair


class Packer:
    """Batches from documents that are shuffled anew each epoch. `position` says all that the next batch depends on.

    Documents are dealt to the rows of a step in turn, and each row goes through its own: what a row holds depends
    neither on the other rows nor on how many processes read them.

    A document's blocks begin where its completion does; what is before is padded to whole blocks on its left, and its
    last block is filled with EOS, so that the denoiser learns what stands after an end. A document longer than a row
    goes on in the next, as if it began there.

    Args:
      documents: by number.
      rows: B, of a step.
      length: L.
      blocks: M, most denoised blocks of a row.
      block_size: S; 1, with L blocks, in AR training, which knows none.
      seed: of the order.
      eos: what fills a last block.
      position: (B, 2) int64, where to begin: for each row the number of its next document, counted over all epochs,
        and the token that it goes on from. Rows that are not read here stay as they are.
      only: numbers of the rows to read; all by default.
    """

    def __init__(
        self,
        documents: Any,
        rows: int,
        length: int,
        blocks: int,
        block_size: int,
        seed: int,
        eos: int,
        position: np.ndarray | None = None,
        only: np.ndarray | None = None,
    ):
        self._count = len(documents)
        self._step, self._length, self._blocks, self._size = rows, length, blocks, block_size
        self._seed, self._eos = seed, eos
        self._rows = np.arange(rows) if only is None else only
        self.position = beginning(rows) if position is None else position.copy()
        self._document = functools.lru_cache(2 * len(self._rows))(documents.__getitem__)  # a long one is many pieces
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)  # rows may be in two epochs at a time

    @property
    def epochs(self) -> float:
        """How often the documents have been read, by the rows that are read here."""
        return float(self.position[self._rows, 0].mean() / self._count)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self._count)

    def _piece(self, number: int, token: int) -> tuple[np.ndarray, int, int]:
        """Tokens that begin or continue a document, how many of them are given, and where it goes on (0: nowhere)."""
        epoch, index = divmod(number, self._count)
        document = self._document(int(self._order(epoch)[index]))
        tokens, prompt = document.tokens[token:], max(0, document.prompt - token)
        if prompt:  # of a long prompt the end counts, with room for a first block
            room = (self._length - self._size) // self._size * self._size
            cut = max(0, prompt - room)
            tokens, prompt = tokens[cut:], prompt - cut
        room = min(self._length - (prompt + -prompt % self._size), self._blocks * self._size)
        used = min(len(tokens), prompt + room)
        after = len(document.tokens) - len(tokens) + used if used < len(tokens) else 0
        return tokens[:used], prompt, after

    def __next__(self) -> Batch:
        """The next batch of the rows that are read here, in numpy."""
        shape, size = (len(self._rows), self._length), self._size
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        targets = np.zeros(shape, bool)
        starts = np.full((len(self._rows), self._blocks), -1, np.int32)
        position = self.position.copy()
        for here, row in enumerate(self._rows):
            at = count = used = 0
            while True:
                number, token = position[row].tolist()
                piece, prompt, after = self._piece(number, token)
                pad = -prompt % size
                completion = len(piece) - prompt
                blocks = -(-completion // size)
                end = at + pad + prompt + blocks * size
                if end > self._length or used + blocks > self._blocks:
                    break
                first = at + pad
                count += 1
                tokens[here, first:end] = self._eos
                tokens[here, first : first + len(piece)] = piece
                segments[here, first:end] = count
                targets[here, first + prompt : end] = True
                starts[here, used : used + blocks] = first + prompt + size * np.arange(blocks)
                used, at = used + blocks, end
                position[row] = (number, after) if after else (number + self._step, 0)
        self.position = position  # not before: a document may be none
        return Batch(tokens, segments, targets, starts)


def beginning(rows: int) -> np.ndarray:
    """The position of `rows` rows before the first step."""
    return np.stack([np.arange(rows), np.zeros(rows, np.int64)], axis=1)

"""Packing keeps every token of every document, blocks begin where completions do, and a position is all that counts."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import twotower_jax as tt
from twotower_jax.training.data import Document, Documents, Packer, beginning

EOS = 9


def documents(count=40, longest=30, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = int(rng.integers(1, longest))
        tokens = np.append(rng.integers(10, 99, length), EOS).astype(np.int32)
        tokens[0] = 100 + number
        made.append(Document(tokens, int(rng.integers(0, length + 1))))
    return made


def pieces(batch):
    """(tokens, targets, starts of blocks) of each document of a batch."""
    for row in range(len(batch.tokens)):
        for number in range(1, batch.segments[row].max() + 1):
            here = np.flatnonzero(batch.segments[row] == number)
            assert (np.diff(here) == 1).all()
            starts = [start - here[0] for start in batch.blocks[row] if start in here]
            yield batch.tokens[row, here], batch.targets[row, here], starts


@pytest.mark.parametrize("size", [1, 8])
def test_an_epoch_has_every_document_once(size):
    """Over as many steps as it takes, each row's documents are every third of the epochs' orders, whole."""
    made = documents()
    packer = Packer(made, rows=3, length=48, blocks=48 // size, block_size=size, seed=1, eos=EOS)
    seen = [[], [], []]
    while packer.position[:, 0].min() < 2 * len(made):
        batch = next(packer)
        for row in range(3):
            for tokens, targets, starts in pieces(jax.tree.map(lambda z, row=row: z[row : row + 1], batch)):
                document = made[tokens[0] - 100]
                length = len(document.tokens)
                np.testing.assert_array_equal(tokens[:length], document.tokens)
                assert (tokens[length:] == EOS).all()
                assert len(tokens) - length < size
                assert not targets[: document.prompt].any()
                assert targets[document.prompt :].all()
                assert starts == list(range(document.prompt, len(tokens), size))
                seen[row].append(tokens[0] - 100)
    rounds = zip(*[row[: 2 * len(made) // 3 + 1] for row in seen], strict=True)
    stream = [number for dealt in rounds for number in dealt]
    one, two = stream[: len(made)], stream[len(made) : 2 * len(made)]
    assert sorted(one) == sorted(two) == list(range(len(made)))
    assert one != two
    assert one != sorted(one)


def test_rows_of_several_processes():
    """Rows that are read apart are those that one process reads."""
    arguments = {"rows": 4, "length": 48, "blocks": 6, "block_size": 8, "seed": 1, "eos": EOS}
    whole = Packer(documents(), **arguments)
    parts = [Packer(documents(), **arguments, only=np.array(only)) for only in ([0, 2], [1, 3])]
    for _ in range(8):
        expected, (even, odd) = next(whole), map(next, parts)
        for name in ("tokens", "segments", "targets", "blocks"):
            np.testing.assert_array_equal(getattr(expected, name)[::2], getattr(even, name))
            np.testing.assert_array_equal(getattr(expected, name)[1::2], getattr(odd, name))
    np.testing.assert_array_equal(parts[0].position[::2], whole.position[::2])
    np.testing.assert_array_equal(parts[0].position[1::2], beginning(4)[1::2])
    assert parts[0].epochs > 0


def test_blocks_begin_at_multiples():
    packer = Packer(documents(), rows=3, length=48, blocks=6, block_size=8, seed=1, eos=EOS)
    for _ in range(5):
        batch = next(packer)
        assert (batch.blocks[batch.blocks >= 0] % 8 == 0).all()
        rows, columns = np.nonzero(batch.targets)
        covered = {(row, start + i) for row in range(3) for start in batch.blocks[row] if start >= 0 for i in range(8)}
        assert covered == set(zip(rows.tolist(), columns.tolist(), strict=True))


def test_no_more_blocks_than_asked_for():
    packer = Packer(documents(longest=20), rows=2, length=64, blocks=3, block_size=8, seed=0, eos=EOS)
    for _ in range(10):
        batch = next(packer)
        assert batch.blocks.shape == (2, 3)
        assert batch.targets.sum() == 8 * (batch.blocks >= 0).sum()


def test_long_documents_go_on():
    """Text in as many pieces as it needs; of a long prompt the end stays."""
    text = Document(np.arange(100, 250, dtype=np.int32), 0)
    packer = Packer([text], rows=1, length=48, blocks=6, block_size=8, seed=0, eos=EOS)
    found = []
    while packer.position[0, 0] == 0:
        found += [tokens[tokens != EOS] for tokens, _, _ in pieces(next(packer))]
    np.testing.assert_array_equal(np.concatenate(found)[: len(text.tokens)], text.tokens)
    assert len(found) == 4
    asked = Document(np.append(np.arange(100, 200), [1, 2, 3, EOS]).astype(np.int32), 100)
    batch = next(Packer([asked], rows=1, length=48, blocks=6, block_size=8, seed=0, eos=EOS))
    ((tokens, targets, starts),) = pieces(batch)
    np.testing.assert_array_equal(tokens, [*range(160, 200), 1, 2, 3, EOS, *[EOS] * 4])
    assert starts == [40]
    assert targets.sum() == 8


@pytest.mark.parametrize("batches", [1, 7, 20])
def test_a_position_is_all_that_counts(batches):
    """A packer that begins where another is gives what that one gives, in this epoch and the next ones."""
    arguments = {"rows": 3, "length": 40, "blocks": 5, "block_size": 8, "seed": 3, "eos": EOS}
    one = Packer(documents(longest=90), **arguments)
    for _ in range(batches):
        next(one)
    other = Packer(documents(longest=90), **arguments, position=one.position)
    for _ in range(10):
        for a, b in zip(dataclasses.astuple(next(one)), dataclasses.astuple(next(other)), strict=True):
            np.testing.assert_array_equal(a, b)


def encode(text):
    return [ord(c) - 32 for c in text]


def read(*files, vocab=96):
    found = Documents(tuple(map(str, files)), encode, EOS, vocab, mask=3)
    return [found[i] for i in range(len(found))]


def test_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "hi"}\n\n{"prompt": "q", "completion": "ab)"}\n')
    (tmp_path / "b.txt").write_text("one\n\n\ntwo")
    found = read(tmp_path / "*")
    assert [(d.tokens.tolist(), d.prompt) for d in found[:2]] == [([72, 73, EOS], 0), ([81, 65, 66, EOS], 1)]
    assert len(found) == 4
    assert found[3].tokens.tolist() == [*encode("two"), EOS]


BAD = {
    "empty.jsonl": (b"", "is empty: it has no document"),
    "blank.txt": (b"\n\n", "is empty: it has no document"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', "latin.jsonl, line 2: not UTF-8"),
    "text.jsonl": (b'{"text": "a"}\nhello\n', "text.jsonl, line 2: not JSON"),
    "list.jsonl": (b"[1]\n", 'line 1: must be {"text"'),
    "other.jsonl": (b'{"prompt": "a"}\n', 'line 1: must be {"text"'),
    "number.jsonl": (b'{"text": 5}\n', 'line 1: must be {"text"'),
    "both.jsonl": (b'{"prompt": "a", "text": "b"}\n', 'line 1: must be {"text"'),
    "nothing.jsonl": (b'{"prompt": "", "completion": ""}\n', "not empty"),
    "half.jsonl": (b'{"text": "a"}\n{"text": "\\ud800"}\n', "half.jsonl, line 2: holds half of a surrogate pair"),
    "mask.jsonl": (b'{"text": "a#"}\n', "mask.jsonl, line 1: holds the token of [MASK], id 3"),
    "array.json": (b'[{"text": "a"}]\n', "array.json: give .jsonl"),
    "large.jsonl": (b'{"text": "~~"}\n', "the tokenizer gives id 94, the model's ids end at 90"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(tt.InputError) as error:
        read(tmp_path / name, vocab=91)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_editors_marks_are_not_text(tmp_path):
    """Byte order marks, and the line ends of text."""
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hi"}\r\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfa b\r\nc\r\n\r\nd")
    (tmp_path / "folder.txt").mkdir()
    found = Documents((str(tmp_path / "*"),), lambda text: list(text.encode()), EOS, 256)
    assert [bytes(found[i].tokens[:-1].tolist()) for i in range(3)] == [b"hi", b"a b\nc\n", b"d"]


def test_a_long_document_is_read_once(tmp_path):
    """However many rows it fills."""
    (tmp_path / "a.txt").write_text("abc " * 1000)
    calls = []

    def counted(text):
        calls.append(text)
        return encode(text)

    packer = Packer(Documents((str(tmp_path / "a.txt"),), counted, EOS, 96), 2, 32, 32, 1, 0, EOS)
    for _ in range(5):
        next(packer)
    assert len(calls) == 1


def test_no_files(tmp_path):
    with pytest.raises(tt.InputError, match="names no file"):
        read(tmp_path / "*.jsonl")


def test_json_escapes(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a b"}) + "\n")
    assert read(tmp_path / "a.jsonl")[0].tokens.tolist() == [65, 0, 66, EOS]


def test_a_bad_document_moves_nothing():
    """Neither its own row nor those that were packed before it."""
    made = documents()

    class Mended(list):
        bad = made[2]

        def __getitem__(self, number):
            document = super().__getitem__(number)
            if document is self.bad:
                raise tt.InputError("line 3: not JSON")
            return document

    source = Mended(made)
    packer = Packer(source, rows=3, length=48, blocks=6, block_size=8, seed=1, eos=EOS)
    good = Packer(made, rows=3, length=48, blocks=6, block_size=8, seed=1, eos=EOS)
    before = []

    def go_on():
        while True:
            before.append(packer.position)
            next(packer)
            next(good)

    with pytest.raises(tt.InputError, match="line 3"):
        go_on()
    assert len(before) > 1
    np.testing.assert_array_equal(packer.position, before[-1])
    source.bad = None
    np.testing.assert_array_equal(next(packer).tokens, next(good).tokens)

"""Pieces do what they are timed for, and begin every time as they began."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from twotower_jax.benchmark import pieces, rows
from twotower_jax.benchmark.pieces import Setting
from twotower_jax.programs import Programs
from twotower_jax.sharding import WHOLE

ROWS, SIZE, CONTEXT, CAPACITY, MASK = 2, 16, 32, 128, 3


@pytest.fixture
def setting(small):
    return Setting(small.config, small.dtype, ROWS, CONTEXT, CAPACITY, SIZE, MASK)


def called(piece, given, small):
    """What a piece keeps and gives, the second time; it is compiled for the shapes that it says."""
    kept, *arrays = small.group.put((given.kept, *given.arrays), WHOLE)
    pieces.begin(piece, small.programs, small.group, small.shapes)
    begun = set(small.programs._begun)
    run = small.programs.take(small.group, piece.program, piece.own(small.params), kept, *arrays, **piece.sizes).call
    assert set(small.programs._begun) == begun
    for _ in range(2):
        kept, rest = run(piece.own(small.params), kept, *arrays)
    return jax.device_get((kept, rest))


def test_context_pieces(setting, small, small_rows):
    found = {piece.name: piece for piece in pieces.context_pieces(setting, small.params["context"])}
    for name in ("AR step", "commit", "verify", "prefill, 32 tokens"):
        given = found[name].given(small_rows)
        kept, rest = called(found[name], given, small)
        before = given.kept
        assert (kept.state.length == before.state.length).all()
        assert jax.tree.all(jax.tree.map(np.array_equal, kept.rows, before.rows))
        assert not np.array_equal(kept.state.layers[0].ssm, before.state.layers[0].ssm)  # it was read
        if name == "AR step":
            assert (rest[1].count == found[name].count).all()
            assert found[name].count == SIZE
        if name == "verify":
            assert (rest[2].count >= 1).all()
    for length in (1, SIZE):
        piece = found[f"head, {length} position{'s' * (length > 1)}"]
        _, logits = called(piece, piece.given(small_rows), small)
        assert logits.shape == (ROWS, length, small.config.vocab_size)
    given = found["sampler"].given(small_rows)
    _, (drawn, probability, broken) = called(found["sampler"], given, small)
    (logits,) = given.arrays
    assert (drawn == logits.argmax(-1)).all()
    assert not broken.any()
    assert ((probability > 0) & (probability < 1)).all()


def test_denoiser_pieces(setting, small, small_rows):
    reader = rows.Reader(small.programs, small.config, small.group, CAPACITY, SIZE, MASK)
    read = reader.denoised(small.params, small_rows)
    one, refined = pieces.denoiser_pieces(setting, small.params["denoiser"])
    given = one.given(read)
    kept, (block, news, _) = called(one, given, small)
    assert (block.step == one.count).all()
    assert one.count == SIZE
    assert (news.count == SIZE).all()
    assert not block.masked.any()
    assert not kept.begun.any()
    before = given.kept.state
    assert jax.tree.all(jax.tree.map(np.array_equal, kept.state, before))  # nothing of it is written
    _, block = called(refined, refined.given(read), small)
    assert (block.masked.sum(-1) == SIZE - 1).all()


def test_timed(setting, small, small_rows, hasty, monkeypatch):
    """Of what is still being compiled nothing is left when the first call is made."""
    *_, piece = pieces.context_pieces(setting, small.params["context"])
    programs, goes_on, original = Programs(), threading.Event(), pieces.seconds

    def alone(once):
        assert all(begun.compiled.done() for begun in programs._begun.values())
        return original(once)

    monkeypatch.setattr(pieces, "seconds", alone)
    slow = programs._compilers.submit(goes_on.wait, 60)
    programs._begun["slow"] = dataclasses.make_dataclass("Begun", ["compiled"])(slow)
    threading.Timer(0.5, goes_on.set).start()
    found = pieces.timed(piece, piece.given(small_rows), programs, small.group, small.params)
    assert 0 < found.seconds.least <= found.seconds.median
    assert found.compile_seconds > 0

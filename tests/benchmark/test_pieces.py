"""Pieces do what they are timed for, and begin every time as they began."""

import jax
import numpy as np
import pytest

from twotower_jax.benchmark import pieces, rows
from twotower_jax.benchmark.pieces import Setting
from twotower_jax.programs import Program
from twotower_jax.sharding import WHOLE

ROWS, SIZE, CONTEXT, CAPACITY, MASK = 2, 16, 32, 128, 3


@pytest.fixture
def setting(small, small_rows):
    return Setting(small.config, small.group, small.dtype, small_rows, ROWS, CONTEXT, CAPACITY, SIZE, MASK)


def called(piece, small):
    """What a piece keeps and gives, the second time."""
    own = {piece.tower: small.params[piece.tower]} if piece.tower else {}
    kept, *arrays = small.group.put((piece.kept, *piece.arrays), WHOLE)
    program = Program(piece.function, (WHOLE,) * (2 + len(arrays)), (WHOLE, WHOLE), donated=(1,))
    run = program.on(small.group, **piece.sizes)
    for _ in range(2):
        kept, rest = run(own, kept, *arrays)
    return jax.device_get((kept, rest))


def test_context_pieces(setting, small):
    found = {piece.name: piece for piece in pieces.context_pieces(setting, small.params["context"])}
    for name in ("AR step", "commit", "verify", "prefill, 32 tokens"):
        kept, rest = called(found[name], small)
        before = found[name].kept
        assert (kept.state.length == before.state.length).all()
        assert jax.tree.all(jax.tree.map(np.array_equal, kept.rows, before.rows))
        assert not np.array_equal(kept.state.layers[0].ssm, before.state.layers[0].ssm)  # it was read
        if name == "AR step":
            assert (rest[1].count == found[name].count).all()
            assert found[name].count == SIZE
        if name == "verify":
            assert (rest[2].count >= 1).all()
    for length in (1, SIZE):
        _, logits = called(found[f"head, {length} position{'s' * (length > 1)}"], small)
        assert logits.shape == (ROWS, length, small.config.vocab_size)
    _, (drawn, probability, broken) = called(found["sampler"], small)
    (logits,) = found["sampler"].arrays
    assert (drawn == logits.argmax(-1)).all()
    assert not broken.any()
    assert ((probability > 0) & (probability < 1)).all()


def test_denoiser_pieces(setting, small):
    choices = rows.denoised(small.config, small.group, small.params, setting.read, SIZE, MASK)
    one, refined = pieces.denoiser_pieces(setting, small.params["denoiser"], choices)
    kept, (block, news, _) = called(one, small)
    assert (block.step == one.count).all()
    assert one.count == SIZE
    assert (news.count == SIZE).all()
    assert not block.masked.any()
    assert not kept.begun.any()
    before = one.kept.state
    assert jax.tree.all(jax.tree.map(np.array_equal, kept.state, before))  # nothing of it is written
    _, block = called(refined, small)
    assert (block.masked.sum(-1) == SIZE - 1).all()


def test_timed(setting, small, hasty):
    *_, piece = pieces.context_pieces(setting, small.params["context"])
    found = pieces.timed(piece, small.group, small.params)
    assert 0 < found.seconds.least <= found.seconds.median
    assert found.compile_seconds > 0

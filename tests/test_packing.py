"""Packed documents, read in one pass, leave before each block the state that decoding would have there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax import two_tower
from twotower_jax.state import KVCache, MambaState, Packing

SIZE = 8  # of a block
LENGTH = 12 * SIZE


def packed(rng, vocab):
    """Two rows of documents (tokens, first block), with padding before some; the second row ends early."""
    tokens, segments = np.zeros((2, LENGTH), np.int32), np.zeros((2, LENGTH), np.int32)
    documents = []  # row, first position, end
    for row, lengths in enumerate([[19, 8, 40, 17], [1, 30, 16]]):
        at = 0
        for number, length in enumerate(lengths, start=1):
            end = -(-(at + length) // SIZE) * SIZE
            first = end - length
            tokens[row, first:end] = rng.integers(4, vocab, length)
            segments[row, first:end] = number
            documents.append((row, first, end))
            at = end
    starts = [
        [start for r, first, end in documents if r == row for start in range(-(-first // SIZE) * SIZE, end, SIZE)]
        for row in range(2)
    ]
    starts = [(row + [0] * 12)[:12] for row in starts]
    return tokens, segments, np.array(starts, np.int32), documents


@functools.partial(jax.jit, static_argnums=0)
def read(config, params, tokens, packing):
    return two_tower.read_packed(config, params["context"]["tower"], tokens, packing)


prefill = jax.jit(two_tower.prefill, static_argnums=(0, 4))
denoise = jax.jit(two_tower.denoise, static_argnums=0)


def blocks_of(starts, documents):
    """(index among the folded rows, row, document's first position, block's start)."""
    for row, first, end in documents:
        for start in range(-(-first // SIZE) * SIZE, end, SIZE):
            yield row * starts.shape[1] + starts[row].tolist().index(start), row, first, start


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_denoiser_after_a_packed_pass(golden, noise):
    """Logits of every block, as after a prefill of its document up to it, alone; the first block of a document too."""
    config, params = golden.model.config, golden.model.params
    rng = np.random.default_rng(0)
    tokens, segments, starts, documents = packed(rng, config.vocab_size)
    _, state = read(config, params, tokens, Packing(segments, starts, SIZE))
    noisy = np.where(rng.random(tokens.shape) < noise, 3, tokens)
    folded = np.stack([noisy[row, start : start + SIZE] for row in range(2) for start in starts[row]])
    t = rng.random(len(folded)).astype(np.float32)
    logits = denoise(config, params, state, folded, t)
    checked = 0
    for index, row, first, start in blocks_of(starts, documents):
        prompt = np.zeros((1, LENGTH), np.int32)
        prompt[0, : start - first] = tokens[row, first:start]
        _, alone = prefill(config, params, prompt, np.array([start - first]), LENGTH)
        expected = denoise(config, params, alone, folded[index : index + 1], t[index : index + 1])
        np.testing.assert_allclose(logits[index], expected[0], atol=1e-4)
        checked += 1
    assert checked == 19 // 8 + 8 // 8 + 40 // 8 + 17 // 8 + 30 // 8 + 16 // 8


def test_states_before_blocks(golden):
    config, params = golden.model.config, golden.model.params
    tokens, segments, starts, documents = packed(np.random.default_rng(1), config.vocab_size)
    _, state = read(config, params, tokens, Packing(segments, starts, SIZE))
    for index, row, first, start in blocks_of(starts, documents):
        prompt = np.zeros((1, LENGTH), np.int32)
        prompt[0, : start - first] = tokens[row, first:start]
        _, alone = prefill(config, params, prompt, np.array([start - first]), LENGTH)
        for ours, theirs in zip(state.layers, alone.layers, strict=True):
            if isinstance(ours, MambaState):
                np.testing.assert_allclose(ours.conv[index], theirs.conv[0], atol=2e-5)
                np.testing.assert_allclose(ours.ssm[index], theirs.ssm[0], rtol=1e-5, atol=2e-5)
            elif isinstance(ours, KVCache):
                np.testing.assert_allclose(ours.key[row, :, first:start], theirs.key[0, :, : start - first], atol=2e-5)
        assert state.first[index] == first
        assert state.length[index] == start


def test_hidden_states_are_each_documents_own(golden):
    config, params = golden.model.config, golden.model.params
    tokens, segments, starts, documents = packed(np.random.default_rng(2), config.vocab_size)
    hidden, _ = read(config, params, tokens, Packing(segments, starts, SIZE))
    logits = two_tower.context_head(params, hidden)
    for row, first, end in documents:
        np.testing.assert_allclose(
            logits[row, first:end], golden.model.context_logits(tokens[row, first:end]), atol=1e-4
        )


def test_experts_are_counted(golden):
    """Every real token chooses its k experts in every layer of them; padding counts nothing."""
    config, params = golden.model.config, golden.model.params
    tokens, segments, starts, _ = packed(np.random.default_rng(3), config.vocab_size)
    _, state = read(config, params, tokens, Packing(segments, starts, SIZE))
    loads = [load for kind, load in zip(config.pattern, state.layers, strict=True) if kind == "E"]
    assert loads
    for load in loads:
        assert load.shape == (config.experts,)
        assert load.sum() == (segments > 0).sum() * config.experts_per_token


def test_gradients_are_finite(tiny):
    """Decay by -inf at a document's start, and rows of nothing but padding, leave no NaN in a gradient."""
    config, params = tiny.model.config, tiny.model.params
    tokens, segments, starts, _ = packed(np.random.default_rng(4), config.vocab_size)
    segments[1] = 0
    segments, starts = jnp.asarray(segments), jnp.asarray(starts)

    def loss(tower, remat):
        hidden, state = two_tower.read_packed(config, tower, tokens, Packing(segments, starts, SIZE), remat)
        states = [layer.ssm.sum() for layer in state.layers if isinstance(layer, MambaState)]
        return jnp.where(segments[..., None] > 0, hidden, 0).sum() + sum(states)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    one, other = (gradient(params["context"]["tower"], remat) for remat in (False, True))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(1, float(np.abs(a).max())))

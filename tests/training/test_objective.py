"""The training objective, all blocks in one pass, is what decoding computes for each block by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax import two_tower
from twotower_jax.state import Packing
from twotower_jax.training import objective
from twotower_jax.training.data import Document, Packer

SIZE, LENGTH, EOS = 8, 64, 5


@pytest.fixture
def batch(golden):
    """Packed documents of the golden model's vocabulary, and where each begins."""
    rng = np.random.default_rng(0)
    made = [
        Document(np.append(rng.integers(10, golden.model.config.vocab_size, n), EOS).astype(np.int32), int(p))
        for n, p in [(20, 5), (11, 0), (30, 16), (9, 3), (3, 3), (50, 7)]
    ]
    packed = next(Packer(made, 3, LENGTH, LENGTH // SIZE, SIZE, 0, EOS))
    return jax.tree.map(jnp.asarray, packed)


@pytest.fixture
def run(settings):
    return dataclasses.replace(settings("denoise"), mask_token_id=3)


def log_probability(logits, tokens):
    return np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(tokens)[..., None], -1)[..., 0]


prefill = jax.jit(two_tower.prefill, static_argnums=(0, 4))
denoise = jax.jit(two_tower.denoise, static_argnums=0)


def block_by_block(model, batch, noise):
    """Log-probabilities of the clean tokens of each block after a real prefill of its document, (blocks, S)."""
    found = []
    for row in range(len(batch.tokens)):
        for column, start in enumerate(np.asarray(batch.blocks[row])):
            index = row * batch.blocks.shape[1] + column
            if start < 0:
                found.append(np.zeros(SIZE))
                continue
            segment = np.asarray(batch.segments[row])
            first = np.flatnonzero(segment == segment[start])[0]
            prompt = np.zeros((1, LENGTH), np.int32)
            prompt[0, : start - first] = batch.tokens[row, first:start]
            _, state = prefill(model.config, model.params, prompt, np.array([start - first]), LENGTH)
            logits = denoise(model.config, model.params, state, noise.noisy[index][None], noise.t[index][None])
            found.append(log_probability(logits[0], noise.clean[index]))
    return np.array(found)


@pytest.mark.parametrize("elbo", [False, True])
def test_denoising_loss_is_decodings(golden, batch, run, elbo):
    model, key = golden.model, jax.random.key(4)
    c = dataclasses.replace(run, elbo_weight=elbo)
    noise = objective.add_noise(c, batch, SIZE, key)
    total, weight, _ = jax.jit(objective.denoising_loss, static_argnums=(0, 1, 5))(
        model.config, c, model.params["context"], model.params["denoiser"], batch, SIZE, key
    )
    nll = -block_by_block(model, batch, noise)
    masked = np.asarray(noise.masked)
    assert masked.any(-1).sum() == (batch.blocks >= 0).sum()
    if elbo:
        weights = masked / np.maximum(np.asarray(noise.drawn_t), 1 / SIZE)[:, None]
        np.testing.assert_allclose(total, (nll * weights).sum(), rtol=1e-5)
        assert weight == SIZE * (batch.blocks >= 0).sum()
    else:
        np.testing.assert_allclose(total, (nll * masked).sum(), rtol=1e-5)
        assert weight == masked.sum()


def test_mock_ar_loss_is_decodings(golden, batch, run):
    """A token of each block, wherever in it: mock-AR's step after a real prefill of all that is before the token."""
    model, key = golden.model, jax.random.key(3)
    noise = objective.add_noise(run, batch, SIZE, jax.random.key(0))
    packing = Packing(batch.segments, jnp.maximum(batch.blocks, 0), SIZE)
    context, denoiser = model.params["context"], model.params["denoiser"]
    _, state = two_tower.read_packed(model.config, context["tower"], batch.tokens, packing)
    total, weight = jax.jit(objective.mock_ar_loss, static_argnums=(0, 1))(
        model.config, run, context, denoiser, batch, state, noise, key
    )
    offsets = np.asarray(jax.random.randint(key, noise.clean.shape[:1], 0, SIZE))
    assert len(set(offsets)) == SIZE  # every place within a block
    expected, count = 0.0, 0
    tokens, segments = np.asarray(batch.tokens), np.asarray(batch.segments)
    for (row, column), start in np.ndenumerate(np.asarray(batch.blocks)):
        at = start + offsets[row * batch.blocks.shape[1] + column]
        if start < 0 or at + 1 == LENGTH or segments[row, at] != segments[row, at + 1]:
            continue
        first = np.flatnonzero(segments[row] == segments[row, at])[0]
        prompt = np.zeros((1, LENGTH), np.int32)
        prompt[0, : at - first] = tokens[row, first:at]
        _, state = prefill(model.config, model.params, prompt, np.array([at - first]), LENGTH)
        logits = denoise(model.config, model.params, state, tokens[row, at][None, None], None)
        expected -= log_probability(logits[0], tokens[row, [at + 1]])[0]
        count += 1
    assert weight == count > 10
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_noise(golden, batch, run):
    noise = objective.add_noise(run, batch, SIZE, jax.random.key(0))
    np.testing.assert_array_equal(noise.noisy, jnp.where(noise.masked, 3, noise.clean))
    np.testing.assert_array_equal(noise.t, noise.masked.sum(-1) / SIZE)
    again = objective.add_noise(run, batch, SIZE, jax.random.key(0))
    np.testing.assert_array_equal(noise.masked, again.masked)
    other = objective.add_noise(run, batch, SIZE, jax.random.key(1))
    assert (noise.masked != other.masked).any()


def test_ar_loss_is_the_logits(golden, batch):
    """Targets after a document's first token, each given what is before it in its own document."""
    model = golden.model
    total, weight, loads = jax.jit(objective.ar_loss, static_argnums=(0, 3))(
        model.config, model.params["context"], batch, False
    )
    expected, count = 0.0, 0
    for row in range(len(batch.tokens)):
        for number in range(1, int(batch.segments[row].max()) + 1):
            here = np.flatnonzero(batch.segments[row] == number)
            ids, target = np.asarray(batch.tokens[row])[here], np.asarray(batch.targets[row])[here]
            found = log_probability(model.context_logits(ids)[:-1], ids[1:])
            expected -= (found * target[1:]).sum()
            count += target[1:].sum()
    assert weight == count
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert set(loads) == {f"layers_{i}" for i, kind in enumerate(model.config.pattern) if kind == "E"}


def test_head_in_pieces(monkeypatch):
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((23, 8)).astype(np.float32), rng.standard_normal((8, 50)).astype(np.float32)
    targets = rng.integers(0, 50, 23)

    def loss(hidden, head):
        return objective.losses(hidden, head, targets).sum()

    whole = jax.value_and_grad(loss, (0, 1))(hidden, head)
    monkeypatch.setattr(objective, "HEAD_SCORES", 50 * 5)
    pieces = jax.value_and_grad(loss, (0, 1))(hidden, head)
    np.testing.assert_allclose(whole[0], -log_probability(hidden @ head, targets).sum(), rtol=1e-5)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)

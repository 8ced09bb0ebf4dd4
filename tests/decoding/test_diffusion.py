"""A denoising step; the mask is an array, not an id."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax import two_tower
from twotower_jax.decoding import diffusion
from twotower_jax.decoding.block import masked_block
from twotower_jax.decoding.sampling import Sampler, position_keys, row_keys
from twotower_jax.decoding.unmasking import Seen, Unmasking
from twotower_jax.state import empty_state


@pytest.mark.parametrize("temperature", [None, 0.5, 4.0])
def test_step_is_its_definition(tiny, temperature):
    """Confidence is the untempered probability of the drawn token, without [MASK]; the rule commits by it."""
    model = tiny.model
    c, params = model.config, model.params
    sampler = Sampler.of(0) if temperature is None else Sampler.of(temperature)
    rules = diffusion.Diffusion(sampler, Unmasking(np.float32(0.2), 9), 3)
    tokens = np.stack([np.resize(tiny.prompt(row), 12) for row in tiny.rows]).astype(np.int32)
    _, state = jax.jit(two_tower.prefill, static_argnums=(0, 4))(c, params, tokens, np.full(4, 12), 16)
    keys = position_keys(row_keys(np.uint32(1), np.arange(4)), state.length[:, None] + np.arange(16))
    block = masked_block(jnp.ones(4, bool), np.full(4, 16), 16, 3)
    step = jax.jit(diffusion.denoise_step, static_argnums=0)
    denoise = jax.jit(two_tower.denoise, static_argnums=0)
    for _ in range(3):
        logits = denoise(c, params, state, block.tokens, block.masked.sum(-1) / 16).at[..., 3].set(-jnp.inf)
        drawn = sampler.predict(logits, keys)
        probability = np.take_along_axis(np.asarray(jax.nn.softmax(logits)), np.asarray(drawn)[..., None], -1)[..., 0]
        seen = Seen(logits, drawn, block.masked)
        np.testing.assert_allclose(seen.confidence, probability, rtol=1e-5)
        commit, _ = rules.unmasking.choose(seen, block)
        after = step(c, params, rules, state, block, keys)
        np.testing.assert_array_equal(after.masked, block.masked & ~commit)
        np.testing.assert_array_equal(after.tokens, jnp.where(commit, drawn, block.tokens))
        block = after


def test_committed_tokens_never_change(golden):
    model = golden.model
    rules = diffusion.Diffusion(Sampler.of(0), Unmasking(np.float32(0.5), 16), 3)
    state = empty_state(model.config, 1, 16, jnp.dtype(jnp.float32))
    keys = jax.random.split(jax.random.key(0), (1, 16))
    step = jax.jit(diffusion.denoise_step, static_argnums=0)
    block = masked_block(jnp.array([True]), np.full(1, 16), 16, 3)
    while block.masked.any():
        after = step(model.config, model.params, rules, state, block, keys)
        assert (after.masked <= block.masked).all()
        assert (np.asarray(after.tokens)[~np.asarray(block.masked)] == block.tokens[~block.masked]).all()
        block = after
    assert (block.tokens != 3).all()


def test_a_bad_row_ends_alone(tiny):
    """A non-finite value in one row's context is that row's error, and no token of it is kept."""
    model = tiny.model
    rules = diffusion.Diffusion(Sampler.of(0), Unmasking(np.float32(0.5), 16), 3)
    state = empty_state(model.config, 2, 16, jnp.dtype(jnp.float32))
    poisoned = state.layers[0].replace(ssm=state.layers[0].ssm.at[1].set(jnp.nan))
    state = state.replace(layers=(poisoned, *state.layers[1:]), length=jnp.array([4, 4]))
    keys = jax.random.split(jax.random.key(0), (2, 16))
    block = masked_block(jnp.array([True, True]), np.full(2, 16), 16, 3)
    step = jax.jit(diffusion.denoise_step, static_argnums=0)
    while block.masked.any():
        block = step(model.config, model.params, rules, state, block, keys)
    assert block.failed.tolist() == [False, True]
    assert (block.tokens[0] != 3).all()
    assert (block.tokens[1] == 3).all()


def test_a_row_that_waits_is_padding(tiny, monkeypatch):
    """A row with a full block, beside others that are not yet, is given to the denoiser as no positions at all."""
    sizes = []

    def denoise(config, params, state, block, t, size):
        sizes.append(size.tolist())
        return jnp.zeros((*block.shape, config.vocab_size))

    monkeypatch.setattr(two_tower, "denoise", denoise)
    rules = diffusion.Diffusion(Sampler.of(0), Unmasking(np.float32(0.5), 16), 3)
    block = masked_block(jnp.array([True, False, True]), np.array([16, 16, 5]), 16, 3)
    diffusion.denoise_step(tiny.model.config, {}, rules, None, block, jnp.zeros((3, 16), jnp.uint32))
    assert sizes == [[16, 0, 5]]

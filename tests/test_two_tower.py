"""Prefill, commit and denoise against the reference, and the properties that the decoders rely on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_of, largest_difference

from twotower_jax import two_tower
from twotower_jax.state import KVCache, MambaState, TowerState

TOLERANCE = 2e-4  # to the golden numbers, all of size about 10


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def prefill(config, params, tokens, count, capacity):
    return two_tower.prefill(config, params, tokens, count, capacity)


extend = jax.jit(two_tower.extend, static_argnames="config")
denoise = jax.jit(two_tower.denoise, static_argnames="config")


def prefilled(model, prompts, capacity=64, width=48) -> TowerState:
    """The state after a ragged batch of prompts."""
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
    return prefill(model.config, model.params, tokens, np.array([len(ids) for ids in prompts]), capacity)[1]


def assert_state(golden, tag, state, row, length):
    """A row of a state against the reference's."""
    checked = 0
    for i, layer in enumerate(state.layers):
        if isinstance(layer, MambaState):
            # The reference keeps K raw inputs; the next position needs K - 1.
            pairs = {"conv": layer.conv[row].T, "ssm": layer.ssm[row]}
        elif isinstance(layer, KVCache):
            pairs = {"key": layer.key[row, :, :length], "value": layer.value[row, :, :length]}
        else:
            continue
        for name, ours in pairs.items():
            theirs = golden[f"{tag}/row{row}/layer{i}/{name}"][0]
            theirs = theirs[:, 1:] if name == "conv" else theirs
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, err_msg=f"{tag} row {row} layer {i} {name}")
            checked += 1
    assert checked == sum(key.startswith(f"{tag}/row{row}/layer") for key in golden.names)


def test_context_logits(golden):
    for row in golden.rows:
        ours = golden.model.context_logits(golden.prompt(row))
        np.testing.assert_allclose(ours, golden[f"context/row{row}/logits"], atol=TOLERANCE)


def test_backbone_logits():
    golden = golden_of("backbone-0")
    for row in golden.rows:
        np.testing.assert_allclose(
            golden.model.context_logits(golden.prompt(row)), golden[f"logits/row{row}"], atol=TOLERANCE
        )


def test_prefill_and_commit_states(golden):
    """All rows as one ragged batch, against the reference's runs one by one."""
    model = golden.model
    state = prefilled(model, golden.prompts)
    assert state.length.tolist() == [len(ids) for ids in golden.prompts]
    for row in golden.rows:
        assert_state(golden, "prefill", state, row, len(golden.prompt(row)))
    blocks = np.stack([golden[f"commit/row{row}/block"] for row in golden.rows])
    _, state = extend(model.config, model.params, state, blocks, np.full(4, 16))
    for row in golden.rows:
        assert_state(golden, "commit", state, row, len(golden.prompt(row)) + 16)


@pytest.mark.parametrize("t", ["1.0", "0.5"])
def test_denoiser_logits(golden, t):
    model = golden.model
    state = prefilled(model, golden.prompts)
    blocks = np.stack([golden[f"denoise/row{row}/t{t}/block"] for row in golden.rows])
    logits = denoise(model.config, model.params, state, blocks, jnp.full(4, float(t)))
    for row in golden.rows:
        np.testing.assert_allclose(logits[row], golden[f"denoise/row{row}/t{t}/logits"], atol=TOLERANCE)


def test_mock_ar_logits(golden):
    model = golden.model
    state = prefilled(model, [ids[:-1] for ids in golden.prompts])
    last = np.array([ids[-1:] for ids in golden.prompts])
    logits = denoise(model.config, model.params, state, last, None)
    for row in golden.rows:
        np.testing.assert_allclose(logits[row], golden[f"mock_ar_step/row{row}/logits"], atol=TOLERANCE)


def test_split_prefix_gives_the_same_state(golden):
    model, ids = golden.model, golden.prompt(3)
    whole = prefilled(model, [ids])
    for split in (1, 2, 16, 33):
        state = prefilled(model, [ids[:split]])
        rest = np.zeros((1, 48), np.int32)
        rest[0, : len(ids) - split] = ids[split:]
        _, state = extend(model.config, model.params, state, rest, np.array([len(ids) - split]))
        assert largest_difference(visible(state), visible(whole)) < 1e-4


def visible(state: TowerState) -> TowerState:
    """The state without what lies in a cache beyond a row's length."""

    def clear(x):
        return jnp.where((jnp.arange(x.shape[2]) < state.length[:, None])[:, None, :, None], x, 0)

    layers = [jax.tree.map(clear, layer) if isinstance(layer, KVCache) else layer for layer in state.layers]
    return state.replace(layers=tuple(layers))


def test_token_by_token_equals_one_pass(tiny):
    """Cached decoding is the full forward."""
    model, ids = tiny.model, tiny.prompt(0)
    full = model.context_logits(ids)
    state = prefilled(model, [ids[:1]])
    for t in range(1, len(ids)):
        hidden, state = extend(model.config, model.params, state, ids[None, t : t + 1], np.array([1]))
        np.testing.assert_allclose(two_tower.context_head(model.params, hidden)[0, 0], full[t], atol=1e-4)


def test_chunked_prefill_equals_one_pass(golden, monkeypatch):
    model = golden.model
    c, params = model.config, model.params
    tokens, count = np.zeros((4, 48), np.int32), np.array([len(ids) for ids in golden.prompts])
    for row, ids in enumerate(golden.prompts):
        tokens[row, : len(ids)] = ids
    last, state = jax.jit(two_tower.prefill, static_argnums=(0, 4))(c, params, tokens, count, 64)
    monkeypatch.setattr(two_tower, "PREFILL_TOKENS", 1)  # chunks of 16, the least; some rows end chunks early
    piecewise = jax.jit(functools.partial(two_tower.prefill, c), static_argnums=3)
    last_in_pieces, state_in_pieces = piecewise(params, tokens, count, 64)
    assert largest_difference(last, last_in_pieces) < 1e-4
    assert largest_difference(visible(state), visible(state_in_pieces)) < 1e-4


def test_long_prompt_takes_no_more_working_memory():
    """Chunked prefill: from 8 k to 64 k tokens the temporaries grow by next to nothing, only the state grows."""
    model = golden_of("tiny-0").model
    temporaries, states = [], []
    for length in (8192, 65536):
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        count = jax.ShapeDtypeStruct((1,), jnp.int32)
        analysis = prefill.lower(model.config, model.params, tokens, count, length).compile().memory_analysis()
        temporaries.append(analysis.temp_size_in_bytes)
        states.append(analysis.output_size_in_bytes)
    assert temporaries[1] - temporaries[0] < (states[1] - states[0]) / 10


def test_padding_changes_nothing(golden):
    """What stands after a row's real tokens reaches neither its state nor its last hidden state."""
    model = golden.model
    c, params = model.config, model.params
    rng = np.random.default_rng(0)
    runs = []
    for _ in range(2):
        tokens = rng.integers(0, c.vocab_size, (4, 48)).astype(np.int32)
        for row, ids in enumerate(golden.prompts):
            tokens[row, : len(ids)] = ids
        last, state = prefill(c, params, tokens, np.array([len(ids) for ids in golden.prompts]), 64)
        runs.append((last, visible(state)))
    assert largest_difference(*runs) == 0


def test_later_token_changes_no_earlier_logit(golden):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, golden.model.config.vocab_size, 40)
    before = golden.model.context_logits(ids)
    for at in (0, 17, 39):
        changed = ids.copy()
        changed[at] = (changed[at] + 1) % golden.model.config.vocab_size
        after = golden.model.context_logits(changed)
        assert (after[:at] == before[:at]).all()
        assert np.abs(after[at:] - before[at:]).max(axis=1).min() > 1e-4


def test_every_block_position_depends_on_every_other(golden):
    model = golden.model
    state = prefilled(model, [golden.prompt(0)])
    rng = np.random.default_rng(0)
    block = rng.integers(4, model.config.vocab_size, (1, 16)).astype(np.int32)
    before = denoise(model.config, model.params, state, block, jnp.array([0.5]))
    for at in range(16):
        changed = block.copy()
        changed[0, at] = (changed[0, at] + 1) % model.config.vocab_size
        after = denoise(model.config, model.params, state, changed, jnp.array([0.5]))
        assert np.abs(after - before).max(axis=-1).min() > 1e-6, f"a position does not see position {at}"


def test_denoiser_sees_the_context(golden):
    model = golden.model
    block = np.full((1, 16), 3, np.int32)
    ids = golden.prompt(0)
    changed = np.concatenate([[(ids[0] + 1) % model.config.vocab_size], ids[1:]])
    one, other = (
        denoise(model.config, model.params, prefilled(model, [prompt]), block, jnp.ones(1)) for prompt in (ids, changed)
    )
    assert np.abs(one - other).max(axis=-1).min() > 1e-6

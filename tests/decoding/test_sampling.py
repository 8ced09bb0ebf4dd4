"""The distribution of draws, its restriction, and what a draw depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax.decoding.sampling import Sampler, position_keys, row_keys

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -6.0], np.float32)
DRAWS = 200_000


def frequencies(sampler, logits=LOGITS, draws=DRAWS):
    keys = jax.random.split(jax.random.key(1), (1, draws))
    tokens = sampler.predict(jnp.broadcast_to(logits, (1, draws, len(logits))), keys)
    return np.bincount(np.asarray(tokens)[0], minlength=len(logits)) / draws


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def assert_distributed(observed, expected, draws=DRAWS):
    """Within five standard deviations, and nothing where nothing may be."""
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(observed - expected) <= 5 * deviation).all(), (observed, expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature(temperature):
    assert_distributed(frequencies(Sampler.of(temperature)), softmax(LOGITS / temperature))


def test_lowest_temperature_is_greedy():
    assert_distributed(frequencies(Sampler.of(1e-37), LOGITS + 1000, draws=100), np.eye(6)[0], draws=100)


def test_large_vocabulary():
    """Many rare tokens together keep their share: coarse Gumbel noise would take it from them."""
    logits = np.concatenate([[10.0], np.zeros(20_000)]).astype(np.float32)
    observed = frequencies(Sampler.of(1.0), logits, draws=4_000)
    rare = 1 - softmax(logits)[0]
    assert_distributed(np.array([1 - observed[0]]), np.array([rare]), draws=4_000)


def test_noise_has_its_tail():
    """A draw is the largest of logits + Gumbel noise, of more bits than JAX spends by default."""
    logits = jnp.zeros(5_000)
    keys = jax.random.split(jax.random.key(2), 50)
    noise = [jax.random.gumbel(key, logits.shape, mode="high") for key in keys]
    coarse = [jax.random.gumbel(key, logits.shape) for key in keys]
    tokens = Sampler.of(1.0).predict(jnp.broadcast_to(logits, (1, 50, 5_000)), keys[None])[0]
    np.testing.assert_array_equal(tokens, np.argmax(noise, axis=-1))
    assert (tokens != np.argmax(coarse, axis=-1)).any()


def test_top_k():
    expected = softmax(np.where(np.arange(6) < 2, LOGITS, -np.inf))
    assert_distributed(frequencies(Sampler.of(1.0, top_k=2)), expected)
    assert_distributed(frequencies(Sampler.of(1.0, top_k=100)), softmax(LOGITS))


@pytest.mark.parametrize(("top_p", "kept"), [(0.0, 1), (0.3, 1), (0.7, 2), (0.9, 4), (1.0, 6)])
def test_top_p(top_p, kept):
    """The fewest most probable tokens whose mass reaches top_p; they sum to 0.56, 0.77, 0.896, 0.97..."""
    expected = softmax(np.where(np.arange(6) < kept, LOGITS, -np.inf))
    assert_distributed(frequencies(Sampler.of(1.0, top_p=top_p)), expected)


def test_top_k_comes_before_top_p():
    """Of the two kept by k, the first alone has 0.73 of what is left."""
    assert_distributed(frequencies(Sampler.of(1.0, top_p=0.7, top_k=2)), np.eye(6)[0])


def test_greedy_takes_the_first_of_equals():
    logits = jnp.array([[[0.0, 2.0, 2.0]]])
    assert Sampler.of(0).predict(logits, jax.random.split(jax.random.key(0), (1, 1))) == 1


def test_keys_are_of_seed_row_and_position():
    def data(seed, rows, positions):
        keys = position_keys(row_keys(np.uint32(seed), np.asarray(rows)), np.asarray(positions))
        return [bytes(key) for key in np.asarray(jax.random.key_data(keys)).reshape(-1, 2)]

    batch = data(7, [0, 1, 5], [[3, 4], [9, 3], [3, 8]])
    assert len(set(batch)) == 6
    assert data(7, [5], [[3, 8]]) == batch[4:]
    assert not set(data(8, [0, 1, 5], [[3, 4], [9, 3], [3, 8]])) & set(batch)

"""Routing against a plain loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_of, load

from twotower_jax.layers import moe
from twotower_jax.state import Span


@pytest.fixture
def config():
    return golden_of("grouped-0").model.config


def plain_route(scores, correction, c):
    """Experts and weights of one token, by the definition."""
    biased = scores + correction
    size = c.experts // c.expert_groups
    groups = [biased[g * size : (g + 1) * size] for g in range(c.expert_groups)]
    kept = sorted(range(c.expert_groups), key=lambda g: -np.sort(groups[g])[-2:].sum())[: c.expert_groups_kept]
    limited = [biased[e] if e // size in kept else 0.0 for e in range(c.experts)]
    chosen = sorted(range(c.experts), key=lambda e: -limited[e])[: c.experts_per_token]
    weights = scores[chosen]
    if c.normalize_weights:
        weights = weights / (weights.sum() + 1e-20)
    return chosen, weights * c.routed_scale


@pytest.mark.parametrize("kept", [1, 2, 4])
@pytest.mark.parametrize("normalize", [True, False])
def test_route_equals_plain_loop(config, kept, normalize):
    c = dataclasses.replace(config, expert_groups_kept=kept, normalize_weights=normalize)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, c.hidden_size)).astype(np.float32)
    router = rng.standard_normal((c.hidden_size, c.experts)).astype(np.float32) * 0.1
    correction = rng.standard_normal(c.experts).astype(np.float32) * 0.3  # some biased scores are negative
    experts, weights = moe.route(*map(jnp.asarray, (x, router, correction)), c)
    for token in range(len(x)):
        chosen, expected = plain_route(1 / (1 + np.exp(-(x[token] @ router))), correction, c)
        assert experts[token].tolist() == chosen
        np.testing.assert_allclose(weights[token], expected, rtol=1e-4)


def test_route_of_scores_that_vanish(config):
    """Weights that sum to zero stay finite."""
    x = jnp.ones((1, config.hidden_size))
    router = jnp.full((config.hidden_size, config.experts), -10.0)
    _, weights = moe.route(x, router, jnp.zeros(config.experts), config)
    assert (weights == 0).all()


def test_router_is_float32():
    """A bfloat16 model routes by float32 weights and scores: a near tie must not pick another expert."""
    model = load("grouped-0", "bfloat16")
    tower = model.params["context"]["tower"]
    p = tower[f"layers_{model.config.pattern.index('E')}"]["mixer"]
    assert p["router"].dtype == p["correction"].dtype == jnp.float32
    x = jax.random.normal(jax.random.key(0), (200, model.config.hidden_size), jnp.bfloat16)
    one = moe.route(x, p["router"], p["correction"], model.config)
    other = moe.route(x.astype(jnp.float32), p["router"], p["correction"], model.config)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_padding_chooses_no_experts(config, monkeypatch):
    """Nor is it counted: an expert that it alone would choose need not be read."""
    given = []

    def product(x, experts, weights, up, down, c):
        given.append((np.asarray(experts), np.asarray(weights)))
        return jnp.zeros(x.shape)

    monkeypatch.setattr(moe, "routed_over_devices", product)
    mixer = golden_of("grouped-0").model.params["context"]["tower"][f"layers_{config.pattern.index('E')}"]["mixer"]
    x = jax.random.normal(jax.random.key(0), (2, 5, config.hidden_size))
    span = Span(jnp.zeros(2, jnp.int32), jnp.array([5, 2]), count_experts=True)
    _, load = moe.MoE(config).apply({"params": mixer}, x, None, span)
    ((experts, weights),) = given
    real = np.array([True] * 7 + [False] * 3)
    assert (experts[real] < config.experts).all()
    assert (experts[~real] == config.experts).all()
    assert (weights[~real] == 0).all()
    assert load.sum() == 7 * config.experts_per_token

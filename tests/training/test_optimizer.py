"""Rates by stage, what is decayed, and the correction of experts' load."""

import jax.numpy as jnp
import numpy as np
import optax

from twotower_jax.training.config import Stage
from twotower_jax.training.optimizer import balance_experts, make_optimizer, schedule, stage_schedule


def test_warmup_stable_decay():
    rate = stage_schedule(Stage(steps=10, learning_rate=1.0, final_learning_rate=0.1, warmup=4, decay=3))
    np.testing.assert_allclose([rate(i) for i in range(10)], [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.7, 0.4, 0.1], rtol=1e-6)
    sudden = stage_schedule(Stage(steps=3, learning_rate=1.0, final_learning_rate=0.1, decay=1))
    np.testing.assert_allclose([sudden(i) for i in range(3)], [1, 1, 0.1], rtol=1e-6)
    for stage in (Stage(steps=5, learning_rate=1.0), Stage(steps=5, learning_rate=1.0, warmup=1)):
        np.testing.assert_allclose([stage_schedule(stage)(i) for i in range(5)], 1.0)


def test_every_stage_begins_anew(settings):
    rate = schedule(settings("denoise", two_stages=True))
    np.testing.assert_allclose([rate(i) for i in (0, 1, 3, 7)], [5e-3, 1e-2, 1e-2, 1e-6], rtol=1e-5)
    assert rate(7) < rate(6) < rate(5) < rate(4) < rate(3)


def test_vectors_and_tables_are_not_decayed(settings):
    optimizer = make_optimizer(settings("denoise"))
    params = {"up": jnp.ones((2, 2)), "tables": jnp.ones((2, 3, 2)), "norm": jnp.ones(2)}
    zeros = {name: jnp.zeros_like(value) for name, value in params.items()}
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    moved = optax.apply_updates(params, updates)
    assert (moved["up"] < 1).all()
    assert (moved["tables"] == 1).all()
    assert (moved["norm"] == 1).all()


def test_busy_experts_are_chosen_less():
    tower = {"layers_0": {"norm": 1, "mixer": {"correction": jnp.zeros(3), "up": 2}}, "layers_1": 3}
    moved = balance_experts(tower, {"layers_0": jnp.array([9, 3, 0])}, 0.01)
    np.testing.assert_allclose(moved["layers_0"]["mixer"]["correction"], [-0.01, 0.01, 0.01])
    assert moved["layers_1"] == 3
    assert (tower["layers_0"]["mixer"]["correction"] == 0).all()

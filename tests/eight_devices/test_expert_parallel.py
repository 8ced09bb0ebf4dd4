"""Tokens that go to experts on other devices: the sum that one device makes, and none is dropped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_of
from jax.sharding import PartitionSpec

from twotower_jax.config import Shards
from twotower_jax.layers import expert_parallel, experts
from twotower_jax.placement import Placement, place

TOKENS, WIDTH, INNER, CHOSEN, TOTAL = 64, 8, 6, 4, 16


@pytest.fixture
def config():
    """Of grouped-0, which has 16 experts, of which a token has 4."""
    return golden_of("grouped-0").model.config


def choices(router, rng):
    every = np.arange(TOTAL)
    match router:
        case "even":
            return np.stack([rng.permutation(every)[:CHOSEN] for _ in range(TOKENS)])
        case "one device":  # the adversary: all tokens want the same experts
            return np.tile(every[-CHOSEN:], (TOKENS, 1))
    return np.stack([every[(t + CHOSEN * np.arange(CHOSEN)) % TOTAL] for t in range(TOKENS)])  # far apart


@pytest.mark.parametrize("room", [None, 1, 3, 8])
@pytest.mark.parametrize("router", ["even", "one device", "far apart"])
@pytest.mark.parametrize("devices", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)), 8])
def test_nothing_is_dropped(config, devices, router, room):
    """By gathering (no room given), and by exchanging in rounds with room for so many tokens."""
    rng = np.random.default_rng(devices)
    x, up, down = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((TOKENS, WIDTH), (TOTAL, INNER, WIDTH), (TOTAL, INNER, WIDTH))
    )
    chosen, weights = choices(router, rng), rng.random((TOKENS, CHOSEN)).astype(np.float32)
    expected = experts.routed(*map(jnp.asarray, (x, chosen, weights, up, down)))

    def run(*arrays):
        way = expert_parallel.gathered if room is None else expert_parallel.exchanged
        return way(*arrays, *(() if room is None else (room,)))

    group = place(Placement(range(devices), mesh={"expert": devices}), config, two_towers=False).context
    spec = PartitionSpec("expert")
    over = jax.shard_map(run, mesh=group.mesh, in_specs=(spec,) * 5, out_specs=spec, check_vma=False)
    y = jax.jit(over)(x, chosen, weights, up, down)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6 * np.abs(expected).max())  # terms are large and cancel


def test_the_way_is_chosen_by_size(config):
    """A decoding step's few tokens are gathered; a prompt's many are exchanged where that moves less."""
    ways = []
    for devices, tokens in ((8, 16), (8, 1024), (2, 1024)):
        c = dataclasses.replace(config, shards=Shards(expert=devices))
        x = jax.ShapeDtypeStruct((tokens * devices, c.hidden_size), jnp.float32)
        chosen = jax.ShapeDtypeStruct((tokens * devices, CHOSEN), jnp.int32)
        weights = jax.ShapeDtypeStruct((tokens * devices, CHOSEN), jnp.float32)
        up = jax.ShapeDtypeStruct((TOTAL, INNER, c.hidden_size), jnp.float32)
        down = jax.ShapeDtypeStruct((TOTAL, INNER, c.hidden_size), jnp.float32)
        group = place(Placement(range(devices), mesh={"expert": devices}), config, two_towers=False).context
        spec = PartitionSpec("expert")

        def run(*arrays, c=c):
            return expert_parallel.routed_over_devices(*arrays, c)

        over = jax.shard_map(run, mesh=group.mesh, in_specs=(spec,) * 5, out_specs=spec, check_vma=False)
        text = jax.jit(over).lower(x, chosen, weights, up, down).as_text()
        ways.append("exchanged" if "all_to_all" in text else "gathered")
    assert ways == ["gathered", "exchanged", "gathered"]

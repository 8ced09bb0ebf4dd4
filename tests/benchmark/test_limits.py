"""Bytes against those of the arrays, operations against what XLA counts in a tower where none are to spare."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax import sources, two_tower
from twotower_jax.benchmark import limits
from twotower_jax.benchmark.limits import Pass, Work
from twotower_jax.benchmark.machine import Rates
from twotower_jax.layers import expert_parallel
from twotower_jax.layers.experts import together
from twotower_jax.parameters import initialize
from twotower_jax.state import KVCache, MambaState, Span, empty_state
from twotower_jax.tower import Tower

ROWS, CONTEXT = 3, 40


@functools.cache
def shapes(config, dtype=jnp.float32):
    description = two_tower.describe(config, True)
    return jax.eval_shape(lambda: initialize(description, config, jax.random.key(0), dtype))


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.fixture(params=["mid", "released"])
def config(request):
    return sources.config_alone(request.param)[0]


def whole(config, **changes):
    """A pass that looks at every weight."""
    every = [config.experts] * config.pattern.count("E")
    return Pass(
        **{"rows": ROWS, "length": 1, "context": CONTEXT, "experts": every, "vocabulary": config.vocab_size} | changes
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_weight_and_state_is_moved_once(config, dtype):
    tower = shapes(config, dtype)["context"]["tower"]
    state = empty_state(config, ROWS, CONTEXT, dtype)
    found = limits.of_pass(config, tower, whole(config, writes=False))
    assert found.bytes == nbytes(tower) + nbytes(state.layers)


def test_what_is_written(config):
    tower = shapes(config)["context"]["tower"]
    state = empty_state(config, ROWS, 1, jnp.float32)
    written = (limits.of_pass(config, tower, whole(config, writes=w)).bytes for w in (True, False))
    assert np.subtract(*written) == nbytes(state.layers)  # the Mamba states, and a position of the caches


def test_experts(config):
    """Of the experts those that are chosen, layer by layer."""
    tower = shapes(config)["context"]["tower"]
    one = nbytes([tower["layers_1"]["mixer"][name] for name in ("up", "down")]) / config.experts
    layers = config.pattern.count("E")
    few = limits.of_pass(config, tower, whole(config, experts=[2.5] * layers))
    more = limits.of_pass(config, tower, whole(config, experts=[3.5] + [2.5] * (layers - 1)))
    assert more.bytes - few.bytes == one
    assert more.operations == few.operations


def test_state_alone(config):
    """The last layers are not needed for it: of mid and the released model those after the last mixer with a state."""
    tower = shapes(config)["context"]["tower"]
    state = empty_state(config, ROWS, CONTEXT, jnp.float32)
    last = max(i for i, kind in enumerate(config.pattern) if kind in "M*")
    unused = [tower["norm_f"], *(tower[f"layers_{i}"] for i in range(last + 1, len(config.pattern)))]
    own = tower[f"layers_{last}"]["mixer"]
    if config.pattern[last] == "M":
        unused += [own[name] for name in ("skip", "norm", "out_proj")]
        assert isinstance(state.layers[last], MambaState)
    else:
        assert isinstance(state.layers[last], KVCache)
        unused += [own["query"], own["out"], state.layers[last]]
    saved = (limits.of_pass(config, tower, whole(config, hidden=h)).bytes for h in (True, False))
    assert np.subtract(*saved) == nbytes(unused)


@pytest.mark.parametrize("causal", [True, False])
def test_operations(monkeypatch, causal):
    """Where every expert is chosen, XLA has hardly more to do than what is counted, and no less."""
    monkeypatch.setattr(expert_parallel, "routed", together)  # XLA counts a loop's turn once
    config, _ = sources.config_alone("mid")
    config = dataclasses.replace(config, experts=4, experts_per_token=4)
    tower, length = shapes(config)["context"]["tower"], 16
    state = jax.eval_shape(lambda: empty_state(config, ROWS, CONTEXT, jnp.float32))
    span = Span(state.length, state.length, causal)

    def one(tower, tokens, state, span):
        return Tower(config).apply({"params": tower}, tokens, state, span)

    tokens = jax.ShapeDtypeStruct((ROWS, length), jnp.int32)
    flops = jax.jit(one).lower(tower, tokens, state, span).cost_analysis()["flops"]
    least = limits.of_pass(config, tower, whole(config, length=length, causal=causal)).operations
    assert 0.85 * flops < least < flops


def test_head_and_time_conditioning(config):
    params = shapes(config)["denoiser"]
    head = limits.of_head(config, params["head"], 5)
    assert head == Work(4 * config.hidden_size * config.vocab_size, 2 * 5 * config.hidden_size * config.vocab_size)
    time = limits.of_time_conditioning(config, params["time"], ROWS)
    assert time.bytes == nbytes(params["time"])
    assert time.operations == 2 * ROWS * config.hidden_size * (256 + 4 * config.hidden_size)


def test_least_time():
    rates = Rates(read=100.0, copied=50.0, operations=10.0)
    assert Work(200, 5).seconds(rates) == 2.0
    assert Work(200, 5).bound(rates) == "bytes"
    assert Work(200, 50).seconds(rates) == 5.0
    assert Work(200, 50).bound(rates) == "operations"


def test_small_numbers_lie_packed():
    assert limits.array_bytes([jnp.zeros(10, jnp.int4), jnp.zeros(3, jnp.bfloat16), jnp.zeros(3, jnp.int8)]) == 14

"""A plan's numbers against what a model on the same devices has."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DATA

import twotower_jax as tt
from twotower_jax.layers import moe
from twotower_jax.layers.experts import routed
from twotower_jax.placement import place
from twotower_jax.plan import Wish, plan
from twotower_jax.plan_report import table


def wish(rows=4, mode="diffusion"):
    return Wish(mode, rows, context=64, block_size=16, dtype=np.dtype(jnp.float32))


COMPILERS = "this machine's, today"


def load(*where):
    return tt.load(DATA / "tiny-0", dtype="float32", placement=tt.Placement(*where))


def held(params):
    """Bytes on one device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))


@pytest.fixture(scope="module")
def divided():
    """Two towers of four devices each."""
    return load(range(4), range(4, 8), {"expert": 2, "tensor": 2})


def test_towers_apart(divided):
    found = plan(divided.config, divided.towers, wish(), COMPILERS)
    for name in "context", "denoiser":
        assert found.parameters[name] == held(divided.params[name])
        assert found.needed[name] > found.parameters[name] + found.states[name]
    c = divided.config
    assert found.moved["caches"] == c.pattern.count("*") * 2 * 16 * c.kv_heads * c.head_dim * 4
    ssm, conv = c.mamba_width * c.state_size, (c.conv_kernel - 1) * c.conv_channels
    assert found.moved["mamba"] == c.pattern.count("M") * 4 * (ssm + conv)
    for programs in found.programs.values():
        for program in programs.values():
            assert not any(copy.startswith("all-gather") for copy in program.copies)
    assert "moved between towers for each block of a row" in table(found, 10**9)


def test_vocabulary_is_not_gathered(divided):
    """Per position go a few numbers for the token, whatever the vocabulary's size; in AR, where little else goes."""
    sizes = []
    for vocab in (128, 4096):
        config = dataclasses.replace(divided.config, vocab_size=vocab)
        towers = place(tt.Placement(range(8), range(8), {"tensor": 4, "data": 2}), config, two_towers=True)
        sizes.append(plan(config, towers, wish(mode="ar"), COMPILERS).programs["both"]["write"].collectives)
    assert sizes[0] == sizes[1] != {}


def test_gathered_experts_are_seen(divided, monkeypatch):
    """If each device did all experts' work itself, the plan would say which weights are copied for it."""

    def gathering(x, experts, weights, up, down, c):
        whole = [jax.lax.all_gather(z, "expert", tiled=True) for z in (up, down)]
        return routed(x, experts, weights, *whole)

    monkeypatch.setattr(moe, "routed_over_devices", gathering)
    copies = plan(divided.config, divided.towers, wish(), COMPILERS).programs["denoiser"]["denoise"].copies
    assert any(copy.startswith("all-gather") for copy in copies)


def test_towers_together():
    model = load([0], [0])
    found = plan(model.config, model.towers, wish(), COMPILERS)
    assert found.parameters == {"both": held(model.params)}
    assert list(found.programs["both"]) == ["denoise_and_read", "feed", "seat"]

"""What compilers make of the programs that matter: of this machine's CPU, and of every target whose package is here.

A model small in depth alone, so that what is copied shows. Every check is tried on a program that it must find guilty.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DATA
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from twotower_jax import two_tower
from twotower_jax.compiled_text import copies, made
from twotower_jax.config import parse_config, read_json
from twotower_jax.layers import expert_parallel, experts
from twotower_jax.layers.linear import einsum, project
from twotower_jax.state import empty_state
from twotower_jax.targets import missing, target

ROWS, BLOCK, LENGTH, CONTEXT, VOCABULARY = 16, 16, 128, 256, 7001


@pytest.fixture(params=["cpu", "h100x1", "v5e:2x2"])
def device(request):
    if request.param == "cpu":
        return jax.devices("cpu")[0]
    if why := missing(request.param):
        pytest.skip(why)
    return target(request.param).devices[0]


@functools.cache
def config():
    raw = read_json(DATA / "released" / "config.json")
    return parse_config(raw | {"hybrid_override_pattern": "E*E", "num_hidden_layers": 3, "vocab_size": VOCABULARY})


def ar_step(params, state, tokens):
    hidden, state = two_tower.extend(config(), params, state, tokens[:, :1], jnp.ones(ROWS, jnp.int32))
    return two_tower.context_head(params, hidden[:, 0]).argmax(-1), state


def denoiser_pass(params, state, tokens):
    block = tokens[:, :BLOCK]
    return two_tower.denoise(config(), params, state, block, jnp.ones(ROWS)).argmax(-1)


def prefill(params, state, tokens):
    return two_tower.extend(config(), params, state, tokens, jnp.full(ROWS, LENGTH))


def all_logits(params, state, tokens):
    return two_tower.context_head(params, prefill(params, state, tokens)[0])


def text(program, device):
    """Of a program for one device, as the engine compiles it: in bfloat16, over a mesh."""
    mesh = Mesh(np.array([device]), ("all",))

    def here(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def parameter(p):
        return here(config().shape(p.axes), p.dtype_in(jnp.bfloat16))

    params = jax.tree.map(parameter, two_tower.describe(config(), two_towers=True))
    state = jax.eval_shape(lambda: empty_state(config(), ROWS, CONTEXT, jnp.bfloat16))
    state = jax.tree.map(lambda z: here(z.shape, z.dtype), state)
    over = jax.shard_map(program, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    return jax.jit(over).lower(params, state, here((ROWS, LENGTH), jnp.int32)).compile().as_text()


def weights_made(text, device):
    """Copies of experts' matrices; on a CPU, which brings a few at a time into its cache, of more than four."""
    rows, columns = config().hidden_size, config().expert_width
    few = rf"\[([1-4],)?({rows},{columns}|{columns},{rows})\]"
    found = copies(text, rows, columns)
    return [copy for copy in found if device.platform != "cpu" or not re.search(few, copy)]


def spread(text):
    """Arrays that hold hidden channels of every expert for every token that one dense product takes."""
    size = experts.TOKENS_AT_ONCE * config().experts * config().expert_width
    hidden = [(operation, dims) for operation, _, dims in made(text) if config().hidden_size not in dims]
    return [(operation, dims) for operation, dims in hidden if math.prod(dims) >= size]


def logits(text):
    return [(operation, dims) for operation, _, dims in made(text) if VOCABULARY in dims]


@pytest.mark.parametrize("program", [ar_step, denoiser_pass])
def test_no_weights_are_copied(device, program):
    assert not weights_made(text(program, device), device)


def test_the_product_of_one_row_is_not_written_out():
    """Before it is summed, as XLA for GPUs does with products of one row."""
    if why := missing("h200x1"):
        pytest.skip(why)
    c, home = config(), SingleDeviceSharding(target("h200x1").devices[0])
    row, matrix = (jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=home) for s in ((1, 3712), (3712, c.hidden_size)))

    def written(product):
        text = jax.jit(product).lower(row, matrix).compile().as_text()
        return [dims for _, _, dims in made(text) if math.prod(dims) >= math.prod(matrix.shape)]

    assert not written(project)
    assert written(functools.partial(einsum, "td,de->te"))


def test_prefill(device):
    found = text(prefill, device)
    assert not spread(found)
    assert not logits(found)
    assert not weights_made(found, device)


def test_what_the_checks_find(device, monkeypatch):
    assert logits(text(all_logits, device))
    monkeypatch.setattr(expert_parallel, "routed", experts.picked)
    assert weights_made(text(ar_step, device), device)
    monkeypatch.setattr(expert_parallel, "routed", experts.in_pieces)
    assert spread(text(prefill, device))

"""One description gives the names and shapes of the released checkpoint, and the modules agree with it."""

import gzip
import json
import math

import jax
import jax.numpy as jnp
from conftest import DATA

from convert import layouts
from twotower_jax import two_tower
from twotower_jax.config import parse_config
from twotower_jax.parameters import flatten
from twotower_jax.state import Span, empty_state
from twotower_jax.tower import Tower


def test_released_names_and_shapes():
    """All 12,544 tensors, 63.186 B parameters; nothing is allocated."""
    config = parse_config(json.loads((DATA / "released" / "config.json").read_text()))
    described = {}
    for _, p in flatten(two_tower.describe(config, two_towers=True)):
        described |= layouts.tensors(p, config.shape(p.axes))
    with gzip.open(DATA / "released" / "tensors.tsv.gz", "rt") as lines:
        released = {name: tuple(map(int, shape.split(","))) for name, shape in (line.split("\t") for line in lines)}
    assert described == released
    assert len(described) == 12544
    assert round(sum(map(math.prod, described.values())) / 1e6) == 63186


def test_modules_declare_what_is_described(golden):
    """`Tower.init` makes the arrays that the description names."""
    c = golden.model.config
    span = Span(start=jnp.zeros(1, jnp.int32), count=jnp.ones(1, jnp.int32))
    state = empty_state(c, 1, 4, jnp.dtype(jnp.float32))
    made = jax.eval_shape(Tower(c).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32), state, span)["params"]
    described = {path: c.shape(p.axes) for path, p in flatten(two_tower.describe(c, True)["context"]["tower"])}
    assert {path: leaf.shape for path, leaf in flatten(made)} == described

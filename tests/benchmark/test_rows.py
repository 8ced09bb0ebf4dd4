"""Rows that are read alone: the state and the experts are those of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import largest_difference

from twotower_jax import two_tower
from twotower_jax.benchmark import rows
from twotower_jax.decoding.block import masked_block
from twotower_jax.state import Span
from twotower_jax.tower import Tower

SIZE, CONTEXT, CAPACITY, MASK = 16, 32, 64, 3


def test_together():
    """Of two rows and two steps: experts {0}, {1, 2} and {0}, {2}."""
    choices = np.zeros((2, 2, 1, 4), bool)
    choices[0, 0, 0, 0] = choices[0, 1, 0, 1] = choices[0, 1, 0, 2] = True
    choices[1, 0, 0, 0] = choices[1, 1, 0, 2] = True
    assert rows.together(choices, 1).tolist() == [1.5]
    assert rows.together(choices, 2).tolist() == [1.5]
    choices[1, 1, 0, 3] = True
    assert rows.together(choices, 2).tolist() == [2.0]


def test_as_in_a_batch(small):
    c, params = small.config, small.params
    sizes = {"context": CONTEXT, "capacity": CAPACITY, "block_size": SIZE}
    read = rows.read(c, small.group, params, 3, **sizes)
    tokens, count = read.tokens[:, :CONTEXT], jnp.full(3, CONTEXT)
    _, state = two_tower.prefill(c, params, tokens, count, CAPACITY)
    assert largest_difference(read.batch(3), state) < 1e-4

    def loads(tokens):
        span = Span(state.length, jnp.full(3, tokens.shape[1]), count_experts=True)
        _, after = Tower(c).apply({"params": params["context"]["tower"]}, tokens, state, span)
        return np.asarray(after.layers[c.pattern.index("E")])

    block = loads(read.tokens[:, CONTEXT:])
    assert rows.together(read.block_choices[:, -1:], 3).tolist() == [(block > 0).sum()]
    first = loads(read.tokens[:, CONTEXT - 1 : CONTEXT])
    assert rows.together(read.token_choices[:, :1], 3).tolist() == [(first > 0).sum()]
    assert read.token_choices.shape == (3, SIZE, 1, c.experts)
    assert (read.token_choices.sum(-1) == c.experts_per_token).all()


def test_denoised(small):
    c, params = small.config, small.params
    read = rows.read(c, small.group, params, 2, CONTEXT, CAPACITY, SIZE)
    found = rows.denoised(c, small.group, params, read, SIZE, MASK)
    assert found.shape == (2, SIZE, 1, c.experts)
    block = masked_block(jnp.ones(2, bool), jnp.full(2, SIZE), SIZE, MASK)
    state = jax.tree.map(jnp.asarray, read.batch(2))
    _, after = two_tower.denoiser_hidden(c, params["denoiser"], state, block.tokens, jnp.ones(2), count_experts=True)
    first = np.asarray(after.layers[c.pattern.index("E")])
    assert rows.together(found[:, :1], 2).tolist() == [(first > 0).sum()]

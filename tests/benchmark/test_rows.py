"""Rows that are read alone: the state and the experts are those of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import largest_difference

from twotower_jax import two_tower
from twotower_jax.benchmark import rows
from twotower_jax.decoding.block import masked_block
from twotower_jax.state import Span
from twotower_jax.tower import Tower

SIZE, CONTEXT, CAPACITY, MASK = 16, 32, 128, 3


def test_together():
    """Of two rows and two steps: experts {0}, {1, 2} and {0}, {2}."""
    choices = np.zeros((2, 2, 1, 4), bool)
    choices[0, 0, 0, 0] = choices[0, 1, 0, 1] = choices[0, 1, 0, 2] = True
    choices[1, 0, 0, 0] = choices[1, 1, 0, 2] = True
    assert rows.together(choices, 1).tolist() == [1.5]
    assert rows.together(choices, 2).tolist() == [1.5]
    choices[1, 1, 0, 3] = True
    assert rows.together(choices, 2).tolist() == [2.0]


def test_as_in_a_batch(small, small_rows):
    c, params, read = small.config, small.params, small_rows

    @jax.jit
    def in_a_batch(tokens, following):
        count = jnp.full(3, CONTEXT)
        _, state = two_tower.prefill(c, params, tokens, count, CAPACITY)
        span = Span(state.length, jnp.full(3, SIZE), count_experts=True)
        _, after = Tower(c).apply({"params": params["context"]["tower"]}, following, state, span)
        return state, after.layers[c.pattern.index("E")]

    state, loads = in_a_batch(read.tokens[:, :CONTEXT], read.tokens[:, CONTEXT:])
    assert largest_difference(read.batch(3), state) < 1e-4
    assert rows.together(read.block_choices[:, -1:], 3).tolist() == [(loads > 0).sum()]
    assert read.token_choices.shape == (3, SIZE, 1, c.experts)
    assert (read.token_choices.sum(-1) == c.experts_per_token).all()


@pytest.mark.slow
def test_denoised(small, small_rows):
    c, params = small.config, small.params
    reader = rows.Reader(small.programs, c, small.group, CAPACITY, SIZE, MASK)
    found = reader.denoised(params, small_rows).pass_choices
    assert found.shape == (3, SIZE, 1, c.experts)
    block = masked_block(jnp.ones(3, bool), jnp.full(3, SIZE), SIZE, MASK)

    @jax.jit
    def first(state):
        _, after = two_tower.denoiser_hidden(
            c, params["denoiser"], state, block.tokens, jnp.ones(3), count_experts=True
        )
        return after.layers[c.pattern.index("E")]

    loads = first(small_rows.batch(3))
    assert rows.together(found[:, :1], 3).tolist() == [(loads > 0).sum()]

"""The ways of running the experts: each is the plain sum, and so are the gradients that are written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import twotower_jax as tt
from twotower_jax.layers import experts
from twotower_jax.layers.experts.grouped import grouped
from twotower_jax.layers.experts.megablox import Megablox
from twotower_jax.layers.experts.tiles import by_expert
from twotower_jax.layers.experts.triton import Triton
from twotower_jax.layers.quantized import quantize

KERNELS = {
    "triton": functools.partial(grouped, Triton(interpret=True)),
    "megablox": functools.partial(grouped, Megablox(interpret=True)),
}
WAYS = {"routed": experts.routed} | {
    name: function for name, (function, platforms) in experts.WAYS.items() if not platforms
}


def case(tokens, total, chosen, width, inner, dtype=np.float32):
    """Most tokens choose the same expert, some one that is not here; nobody chooses the experts 4 to 6."""
    rng = np.random.default_rng(tokens)
    x, up, down = (
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape in ((tokens, width), (total, inner, width), (total, inner, width))
    )
    others = np.stack([rng.permutation(np.r_[0:3, 7 : total + 1])[: chosen - 1] for _ in range(tokens)])
    choices = np.concatenate([np.full((tokens, 1), 3), others], axis=1)
    weights = np.where(choices < total, rng.random((tokens, chosen)), 0).astype(np.float32)
    return x, jnp.asarray(choices, jnp.int32), jnp.asarray(weights), up, down


def plain(x, choices, weights, up, down):
    """By the definition, in float64."""
    x, weights, up, down = (np.asarray(z, np.float64) for z in (x, weights, up, down))
    y = np.zeros_like(x)
    for token, (own, by) in enumerate(zip(np.asarray(choices), weights, strict=True)):
        for e, weight in zip(own, by, strict=True):
            if e < len(up):
                y[token] += weight * (np.maximum(up[e] @ x[token], 0) ** 2 @ down[e])
    return y


def close(y, expected, within=1e-5):
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0, atol=within * np.abs(expected).max())


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("tokens", [1, 2, 16, experts.TOKENS_AT_ONCE + 1])
def test_every_chosen_expert_answers(tokens, name):
    arrays = case(tokens, 12, 2, 8, 6)
    close(WAYS[name](*arrays), plain(*arrays))


# Widths that no tile divides, and one tile of each or several; tokens that are a tile each, and sorted ones.
SHAPES = [(1, 12, 4, 40, 24), (2, 12, 2, 140, 130), (21, 9, 3, 136, 72)]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels(name, shape):
    """Of experts that are not here nothing is read or written: what stands there may be anything."""
    arrays = case(*shape)
    close(KERNELS[name](*arrays), plain(*arrays))


@pytest.mark.parametrize(("bits", "group"), [(8, 160), (8, 32), (4, 80), (4, 8)])
def test_quantized(bits, group):
    """With a scale for a row, for a part of it that is a tile's and for less; both numbers in a byte."""
    x, choices, weights, up, down = case(5, 9, 3, 160, 40)
    up, down = (quantize(w, bits, group) for w in (up, down))
    y = KERNELS["triton"](x, choices, weights, up, down)
    close(y, plain(x, choices, weights, up.dequantized(jnp.float32), down.dequantized(jnp.float32)))


@pytest.mark.parametrize("name", KERNELS)
def test_all_tokens_to_one_expert(name):
    """As many tiles as the grid has room for."""
    x, choices, weights, up, down = case(40, 9, 3, 24, 16)
    alike = (x, jnp.full_like(choices, 8), weights, up, down)
    close(KERNELS[name](*alike), plain(*alike))
    absent = (x, jnp.full_like(choices, 9), jnp.zeros_like(weights), up, down)
    assert (KERNELS[name](*absent) == 0).all()


@pytest.mark.parametrize("name", KERNELS)
def test_bfloat16(name):
    arrays = case(21, 9, 3, 136, 72, jnp.bfloat16)
    y = KERNELS[name](*arrays)
    assert y.dtype == jnp.float32
    close(y, plain(*arrays), within=2**-7)


@pytest.mark.parametrize("name", KERNELS)
def test_a_row_is_alone(name):
    """Bit for bit: other tokens move a token's choices to other tiles, and change nothing."""
    x, choices, weights, up, down = case(21, 9, 3, 136, 72)
    others = KERNELS[name](x[::-1], choices[::-1].at[3].set(1), weights[::-1], up, down)[::-1]
    y = KERNELS[name](x, choices, weights, up, down)
    unlike = 21 - 1 - 3
    np.testing.assert_array_equal(np.delete(y, unlike, 0), np.delete(others, unlike, 0))
    assert (y[unlike] != others[unlike]).any()


@pytest.mark.parametrize("name", KERNELS)
def test_gradients(name):
    """Those of all experts in one product, by x, the weights and both matrices."""
    x, choices, weights, up, down = case(21, 9, 3, 136, 72)
    factor = jnp.asarray(np.random.default_rng(0).standard_normal(x.shape), jnp.float32)

    def gradients(way):
        def loss(x, weights, up, down):
            return (way(x, choices, weights, up, down) * factor).sum()

        return jax.grad(loss, range(4))(x, weights, up, down)

    for mine, expected in zip(gradients(KERNELS[name]), gradients(experts.together), strict=True):
        assert mine.dtype == expected.dtype
        close(mine, np.asarray(expected, np.float64))


def test_tiles():
    """Every choice of an expert that is here lies in one tile, which is that expert's."""
    choices = np.random.default_rng(0).integers(0, 6, (50, 3)).astype(np.int32)
    for total, rows in ((5, 16), (6, 4), (9, 64)):
        ordered = by_expert(jnp.asarray(choices), total)
        tiles, seen = ordered.tiles(rows), []
        order = np.asarray(ordered.order)
        for e, start, stop in zip(*map(np.asarray, (tiles.expert, tiles.start, tiles.stop)), strict=True):
            own = order[start:stop]
            assert len(own) <= rows
            assert (choices.reshape(-1)[own] == e).all()
            seen += own.tolist()
        assert sorted(seen) == np.flatnonzero(choices.reshape(-1) < total).tolist()


@pytest.mark.parametrize(
    ("name", "platform", "message"),
    [("einsum", "cpu", "known are picked, together"), ("triton", "cpu", "'triton' run on cuda, not on cpu")],
)
def test_ways_that_are_not_there(name, platform, message):
    with pytest.raises(tt.InputError, match=message):
        experts.way(name, platform)

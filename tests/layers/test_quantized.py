"""Numbers of 8 and 4 bits, and products with them."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax.layers import experts
from twotower_jax.layers.experts import quantized
from twotower_jax.layers.quantized import Quantized, quantize
from twotower_jax.targets import missing

FORMS = [(8, 96), (8, 32), (4, 16), (4, 48)]  # of rows of 96 numbers


def matrix(shape, seed=0) -> np.ndarray:
    """Rows of very different sizes, with a few large numbers."""
    rng = np.random.default_rng(seed)
    return (rng.standard_t(3, shape) * np.exp(rng.normal(0, 3, (*shape[:-1], 1)))).astype(np.float32)


def in_groups(array, group: int) -> np.ndarray:
    return np.asarray(array, np.float64).reshape(*array.shape[:-1], -1, group)


@pytest.mark.parametrize(("bits", "group"), FORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_off_by_half_a_step(bits, group, dtype):
    """At most, but for numbers of 4 bits that are cut off at -8 or 7; zeros stay zeros."""
    w = jnp.asarray(matrix((7, 96)), dtype).at[3].set(0)
    q = quantize(w, bits, group)
    assert (q.shape, q.bits, q.group) == (w.shape, bits, group)
    assert q.values.nbytes == w.size * bits // 8
    steps = np.abs(in_groups(q.scales, 1))
    off = np.abs(in_groups(q.dequantized(jnp.float32), group) - in_groups(w, group))
    integers = in_groups(q.integers(), group)
    within = np.full(off.shape, True) if bits == 8 else (integers > -8) & (integers < 7)
    assert (off <= (0.5 + 1e-5) * steps)[within].all()
    assert within.mean() > 0.9
    assert (np.asarray(q.dequantized(jnp.float32))[3] == 0).all()
    assert integers.max() > 2 ** (bits - 1) * 0.8  # the bits are used


def test_four_bits_beat_the_largest_number():
    """The steps that are tried leave less than steps of a seventh of the largest number, in every group."""
    w = matrix((64, 96))
    groups = in_groups(w, 48)
    scale = np.abs(groups).max(-1, keepdims=True) / 7
    plain = np.square(np.round(groups / scale) * scale - groups).sum(-1)
    ours = np.square(in_groups(quantize(w, 4, 48).dequantized(jnp.float32), 48) - groups).sum(-1)
    assert ours.sum() < 0.85 * plain.sum()
    assert (ours < 1.15 * plain).all()


def test_every_byte_is_two_numbers():
    values = jnp.arange(256, dtype=jnp.uint8)[None]
    q = Quantized(values, jnp.ones((1, 2), jnp.bfloat16))
    low, high = np.split(np.asarray(q.integers(), int)[0], 2)
    np.testing.assert_array_equal((high + 8) * 16 + low + 8, np.arange(256))
    assert {*low} == {*high} == set(range(-8, 8))
    np.testing.assert_array_equal(q.dequantized(jnp.float32), q.integers())


def test_packing_is_undone():
    """Numbers that 4 bits hold exactly come back."""
    rng = np.random.default_rng(0)
    integers = rng.integers(-8, 8, (5, 96))
    integers[:, ::16] = -8  # so that the step of every group is known
    w = integers * np.repeat(2.0 ** rng.integers(-9, 9, (5, 6)), 16, axis=-1)
    q = quantize(w.astype(np.float32), 4, 16)
    np.testing.assert_array_equal(q.integers(), integers)
    np.testing.assert_array_equal(q.dequantized(jnp.float32), w)


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 16)])
@pytest.mark.parametrize(("tokens", "dtype"), [(1, "float32"), (257, "float32"), (16, "bfloat16")])
def test_every_chosen_expert_answers(bits, group, tokens, dtype):
    """Every way is the plain sum over dequantised experts; most tokens choose the same, and some one not here."""
    rng = np.random.default_rng(tokens)
    total, chosen, width, inner = 12, 2, 32, 6
    up, down = (quantize(matrix((total, inner, width), seed), bits, group) for seed in (1, 2))
    x = jnp.asarray(rng.standard_normal((tokens, width)), dtype)
    picks = np.stack([np.full(tokens, 7), rng.integers(8, total + 1, tokens)], axis=1)
    picks[::5] = [3, 1]
    weights = rng.random((tokens, chosen)).astype(np.float32)
    weights[picks == total] = 0
    expected, terms = np.zeros((2, tokens, width))  # and the sum of the sizes of all that is added
    whole_up, whole_down = (np.asarray(w.dequantized(jnp.float32), np.float64) for w in (up, down))
    for token in range(tokens):
        for e, weight in zip(picks[token] % total, weights[token], strict=True):
            hidden = np.maximum(whole_up[e] @ np.asarray(x[token], np.float64), 0) ** 2
            expected[token] += weight * (hidden @ whole_down[e])
            sizes = (np.abs(whole_up[e]) @ np.abs(np.asarray(x[token], np.float64))) ** 2
            terms[token] += weight * (sizes @ np.abs(whole_down[e]))
    bound = {"float32": 1e-6, "bfloat16": 0.02}[dtype]
    for way in (experts.routed, quantized.picked, quantized.in_pieces):
        y = jax.jit(way)(x, jnp.asarray(picks), jnp.asarray(weights), up, down)
        assert y.dtype == jnp.float32
        assert (np.abs(y - expected) <= bound * terms).all(), way


TEMPORARIES = """
import sys
import jax, jax.numpy as jnp
from twotower_jax.layers import experts
from twotower_jax.layers.quantized import Quantized
from twotower_jax.targets import target

place, bits, group = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
total, inner, width = 128, 1856, 2688
home = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0] if place == "cpu" else target(place).devices[0])

def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=home)

integers = shape(total, inner, width * bits // 8, dtype=jnp.int8 if bits == 8 else jnp.uint8)
weights = Quantized(integers, shape(total, inner, width // group))
for tokens in (16, 256):
    choice = shape(tokens, 6, dtype=jnp.int32), shape(tokens, 6, dtype=jnp.float32)
    compiled = jax.jit(experts.routed).lower(shape(tokens, width), *choice, weights, weights).compile()
    activations = total * tokens * inner * (4 + 2)
    few = 6 * inner * width * 4  # experts, in float32
    found = compiled.memory_analysis().temp_size_in_bytes
    assert found < 1.1 * activations + few, (tokens, found)
"""


@pytest.mark.parametrize("place", ["cpu", "h100x1"])
@pytest.mark.parametrize(("bits", "group"), [(8, 2688), (4, 64)])
def test_no_copy_of_the_experts(place, bits, group):
    """Beside weights of the released shape, 5.1 GB in float32, the compiler needs activations, and few experts. In a
    process of its own, in which JAX has not looked for devices.
    """
    if place != "cpu" and (why := missing(place)):
        pytest.skip(why)
    command = [sys.executable, "-c", TEMPORARIES, place, str(bits), str(group)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

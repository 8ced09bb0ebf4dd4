"""What of every parameter each device holds."""

import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import DATA

import twotower_jax as tt
from twotower_jax import sharding, two_tower
from twotower_jax.config import Shards, parse_config, read_json
from twotower_jax.parameters import Parameter, flatten
from twotower_jax.placement import Placement, parse_devices, parse_mesh, place

SHARDS = [Shards(expert=4, tensor=2), Shards(data=2, tensor=2), Shards(expert=8), Shards(tensor=4)]


def config_of(name):
    return parse_config(read_json(DATA / name / "config.json"))


@pytest.mark.parametrize("shards", SHARDS, ids=str)
@pytest.mark.parametrize("name", ["tiny-0", "trained-0", "released"])
def test_parts_make_the_whole(name, shards):
    """The devices' parts are of the shapes that a device's config says, and together every element is held."""
    whole = config_of(name)
    own = sharding.share(whole, shards)
    places = [
        dict(zip(sharding.MESH_AXES, place, strict=True))
        for place in itertools.product(range(shards.data), range(shards.expert), range(shards.tensor))
    ]
    for path, p in flatten(two_tower.describe(whole, True)):
        shape = whole.shape(p.axes)
        parts = [sharding.part(p, whole, shards, place) for place in places]
        for part in parts:
            assert tuple(sum(r.stop - r.start for r in axis) for axis in part) == own.shape(p.axes), path
        for i, size in enumerate(shape):
            covered = np.zeros(size, int)
            for axis in {tuple((r.start, r.stop) for r in part[i]) for part in parts}:
                for start, stop in axis:
                    covered[start:stop] += 1
            assert covered.min() == 1, path
            if p.axes[i] not in ("kv", "mamba_in", "conv_channels"):  # where several may hold the same heads
                assert covered.max() == 1, path


def test_pieces_of_the_fused_projection():
    """Each device's part of `in_proj` has its own heads' z, x and dt, and their groups' B and C."""
    whole = config_of("released")
    inner, states = 64 * 64, 8 * 128
    p = two_tower.describe(whole, False)["context"]["tower"]["layers_0"]["mixer"]["in_proj"]
    part = sharding.part(p, whole, Shards(tensor=2), {"tensor": 1})
    assert part[0] == (slice(0, 2688),)
    columns = np.concatenate([np.arange(r.start, r.stop) for r in part[1]])
    starts = {"z": (0, inner), "x": (inner, inner), "b": (2 * inner, states), "c": (2 * inner + states, states)}
    starts["dt"] = (2 * inner + 2 * states, 64)
    expected = np.concatenate([np.arange(start + size // 2, start + size) for start, size in starts.values()])
    np.testing.assert_array_equal(columns, expected)


def test_two_axes_on_one_mesh_axis_collide():
    with pytest.raises(ValueError, match=r"x\.weight.*query, kv.*collide.*tensor"):
        sharding.spec(Parameter(("query", "kv"), "x.weight"))


@pytest.mark.parametrize(
    ("name", "shards", "message"),
    [
        ("backbone-0", Shards(expert=8), "mesh expert=8 does not divide the model's 12 experts; 2, 3, 4, 6, 12 would"),
        ("tiny-0", Shards(tensor=3), "mesh tensor=3 does not divide the model's 4 query heads; 2, 4 would"),
        ("trained-0", Shards(tensor=8), "mesh tensor=8 does not divide the model's 4 query heads"),
    ],
)
def test_what_cannot_be_divided(name, shards, message):
    with pytest.raises(tt.InputError, match=message):
        sharding.share(config_of(name), shards)


FOUR = [SimpleNamespace(process_index=0) for _ in range(4)]


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (Placement([0]), "the denoiser tower's devices are not given"),
        (Placement(None, [0]), "the context tower's devices are not given"),
        (Placement([4], [0]), "there is no device 4; there are 4, counted from 0"),
        (Placement([True], [0]), "there is no device True"),
        (Placement([0, 0], [1, 2]), "none twice"),
        (Placement([], [1]), "at least one"),
        (Placement([0, 1], [1, 2]), "both towers have device 1, and other devices too"),
        (Placement([0], [1, 2]), "has 1 devices, the denoiser 2; give each as many"),
        (Placement([0, 1], [2, 3], {"expert": 4}), "mesh expert=4 is of 4 devices, not of 2"),
        (Placement([0, 1], [2, 3], {"data": 1}), "mesh data=1 is of 1 devices, not of 2"),
        (Placement([0, 1], [2, 3], {"rows": 2}), "mesh axis 'rows' is unknown; known are data, expert, tensor"),
        (Placement([0, 1], [2, 3], {"tensor": 0}), "mesh tensor=0: give a whole number of 1 or more"),
        (Placement([0, 1], [2, 3], "expert=2"), "a mesh is given as"),
        (Placement(0, 1), "devices are given as a list of numbers"),
        ({"context_devices": [0]}, "placement must be a tt.Placement"),
    ],
)
def test_bad_wishes(wish, message):
    with pytest.raises(tt.InputError, match=message):
        place(wish, config_of("tiny-0"), True, FOUR)


def test_a_backbone_has_no_denoiser():
    with pytest.raises(tt.InputError, match="this model is a backbone"):
        place(Placement([0], [1]), config_of("backbone-0"), False, FOUR)


@pytest.mark.parametrize("text", ["", "expert", "expert=", "expert=-1", "expert=1,expert=2", "expert=99999999999"])
def test_bad_mesh(text):
    with pytest.raises(tt.InputError, match="a mesh is given as expert=4,tensor=2"):
        parse_mesh(text)


def test_text():
    assert parse_mesh("expert=4, tensor=2") == {"expert": 4, "tensor": 2}
    assert parse_devices("--context-devices", "0, 2") == [0, 2]
    with pytest.raises(tt.InputError, match="--context-devices takes numbers of devices such as 0,1, not 'a'"):
        parse_devices("--context-devices", "a")


def test_released_model_divides_as_its_heads_do():
    """With 2 key/value heads, more tensor shards hold the same ones."""
    own = sharding.share(config_of("released"), Shards(tensor=8))
    assert (own.kv_heads, own.attention_heads, own.mamba_groups, own.expert_width) == (1, 4, 1, 232)
    assert dataclasses.replace(own, shards=Shards()).whole.kv_heads == 2

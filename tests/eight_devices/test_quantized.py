"""Quantised experts over devices: in float32 what one device gives, with experts and their channels divided."""

import numpy as np
import pytest
from conftest import DATA

import twotower_jax as tt
from convert import convert

MESH = {"expert": 4, "tensor": 2}


def test_logits_of_one_device(tmp_path):
    folder = convert(DATA / "tiny-0", tmp_path / "ours", experts="int4").target
    placed = tt.load(folder, "float32", tt.Placement(range(8), range(8), MESH))
    whole = tt.load(folder, "float32", tt.Placement([0], [0]))
    mixer = placed.params["context"]["tower"]["layers_1"]["mixer"]
    for name in ("up", "up_scales", "down", "down_scales"):
        assert {shard.data.size * 8 for shard in mixer[name].addressable_shards} == {mixer[name].size}
    ids = [5, 6, 7, 8, 9, 10, 11, 12] * 3
    np.testing.assert_allclose(placed.context_logits(ids), whole.context_logits(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-0", "grouped-0"])
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_tokens_of_one_device(name, form, tmp_path):
    folder = convert(DATA / name, tmp_path / "ours", experts=form).target

    def run(*wish):
        model = tt.load(folder, "float32", tt.Placement(*wish))
        g = model.generate_mask_diffusion([[5, 6, 7], [8, 9, 10, 11, 12], [20] * 17], max_new_tokens=20)
        return g.tokens, g.forwards, g.errors

    assert run(range(8), range(8), MESH) == run([0], [0])

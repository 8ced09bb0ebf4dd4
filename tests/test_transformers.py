"""A backbone made and saved by transformers' own NemotronH loads and gives its logits (extra `transformers`)."""

import json

import numpy as np
import pytest

import twotower_jax as tt

torch = pytest.importorskip("torch", reason="the extra `transformers` is not installed")
transformers = pytest.importorskip("transformers", "5.20", reason="transformers >= 5.20 is not installed")

TYPES = ["linear_attention", "moe", "linear_attention", "full_attention", "moe", "linear_attention", "mlp"]


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    config = transformers.NemotronHConfig(
        layers_block_type=TYPES,
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=8,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=96,
        routed_scaling_factor=2.5,
        initializer_range=0.1,
    )
    model = transformers.NemotronHForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("e_score_correction_bias"):
                parameter.normal_(0, 0.1)
    return model


def test_saved_by_transformers(backbone, tmp_path):
    backbone.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "hybrid_override_pattern" not in raw
    model = tt.load(tmp_path, dtype="float32")
    assert not model.two_towers
    rng = np.random.default_rng(0)
    for length in (1, 3, 8, 29):
        ids = rng.integers(0, 96, length)
        with torch.no_grad():
            expected = backbone(torch.tensor(ids[None])).logits[0].numpy()
        assert expected.std() > 0.1
        np.testing.assert_allclose(model.context_logits(ids), expected, atol=2e-3)


def test_released_back_to_transformers(backbone, tmp_path):
    """What we write back, transformers reads again."""
    from convert import convert

    backbone.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", hf=True)
    again = transformers.NemotronHForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, backbone(ids).logits)

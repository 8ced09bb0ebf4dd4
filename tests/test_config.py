"""What a config.json may say, and the line that each mistake gets."""

import json
import math

import pytest
from conftest import DATA

import twotower_jax as tt
from twotower_jax.config import parse_config, read_json

RAW = json.loads((DATA / "grouped-0" / "config.json").read_text())
NAMES = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
OLDER_NAMES = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}


@pytest.mark.parametrize("names", [NAMES, OLDER_NAMES])
@pytest.mark.parametrize("key", ["layers_block_type", "layer_types"])
def test_newer_layer_lists(names, key):
    raw = {name: value for name, value in RAW.items() if name != "hybrid_override_pattern"}
    raw[key] = [names[letter] for letter in RAW["hybrid_override_pattern"]]
    assert parse_config(raw) == parse_config(RAW)


def test_infinity_in_either_form(tmp_path):
    file = tmp_path / "config.json"
    for text in ("[0.0, Infinity]", '[0.0, {"__float__": "Infinity"}]'):
        file.write_text(json.dumps(RAW | {"time_step_limit": "LIMIT"}).replace('"LIMIT"', text))
        assert parse_config(read_json(file)).time_step_limit == (0.0, math.inf)
    assert parse_config(RAW | {"time_step_limit": [0.01, 5]}).time_step_limit == (0.01, 5.0)


def test_released():
    config = parse_config(json.loads((DATA / "released" / "config.json").read_text()))
    assert [config.pattern.count(letter) for letter in "M*E-"] == [23, 6, 23, 0]
    assert config.conv_channels == 6144
    assert config.time_step_limit == (0.0, math.inf)


def test_unused_fields_may_be_absent():
    """A tower without experts needs no number of them."""
    needless = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "num_attention_heads")
    raw = {name: value for name, value in RAW.items() if name not in needless}
    config = parse_config(raw | {"hybrid_override_pattern": "M-M-", "num_hidden_layers": 4})
    assert config.experts == 0


BAD = [
    ({"hybrid_override_pattern": "M*EXMEM*-"}, "unknown layer letter 'X' at layer 3"),
    ({"hybrid_override_pattern": ""}, "must be a text of layer letters"),
    ({"hybrid_override_pattern": None}, "neither hybrid_override_pattern nor layers_block_type"),
    ({"hybrid_override_pattern": None, "layers_block_type": ["moe", "rnn"]}, "unknown layer type 'rnn'"),
    ({"hybrid_override_pattern": None, "layers_block_type": "moe"}, "unknown layer type 'moe'"),
    ({"hybrid_override_pattern": None, "layers_block_type": [{}]}, "unknown layer type {}"),
    ({"layers_block_type": ["moe"]}, "is not its list of layer types, 'E'"),
    ({"layer_norm_epsilon": 10**400}, "layer_norm_epsilon must be a number"),
    ({"time_step_limit": [0, 10**400]}, "time_step_limit must be"),
    ({"eos_token_id": True}, "eos_token_id must be an id"),
    ({"num_hidden_layers": 12}, "num_hidden_layers is 12, but"),
    ({"hidden_size": None}, "hidden_size must be a whole number"),
    ({"hidden_size": "96"}, "hidden_size must be a whole number"),
    ({"vocab_size": 0}, "vocab_size must be a whole number of 1 or more"),
    ({"num_key_value_heads": 4}, "num_key_value_heads 4 does not divide num_attention_heads 6"),
    ({"n_groups": 5}, "n_groups 5 does not divide mamba_num_heads 12"),
    ({"n_group": 3}, "n_group 3 does not divide n_routed_experts 16"),
    ({"topk_group": 5}, "topk_group 5 is more than n_group 4"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than the 8 experts"),
    ({"norm_eps": 1e-6}, "layer_norm_epsilon 1e-05 and norm_eps 1e-06 differ"),
    ({"layer_norm_epsilon": "x"}, "layer_norm_epsilon must be a number"),
    ({"time_step_limit": [0.0]}, r"time_step_limit must be \[smallest, largest\]"),
    ({"time_step_limit": [2.0, 1.0]}, "is empty"),
    ({"eos_token_id": "</s>"}, "eos_token_id must be an id"),
    ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
    ({"attention_bias": True}, "only False is a Nemotron-TwoTower"),
    ({"mlp_hidden_act": "silu"}, "only 'relu2' is a Nemotron-TwoTower"),
    ({"residual_in_fp32": True}, "residual_in_fp32 is True"),
    ({"n_shared_experts": 2}, "n_shared_experts is 2"),
    ({"model_type": "llama"}, "is of 'llama', not of a NemotronH"),
    ({"architectures": ["LlamaForCausalLM"]}, "is of 'LlamaForCausalLM', not of a NemotronH"),
    ({"architectures": 5}, "architectures must be a list of names"),
    ({"architectures": "NemotronHForCausalLM"}, "architectures must be a list of names"),
    ({"eos_token_id": 99999}, "eos_token_id must be an id from 0 to"),
    ({"num_hidden_layers": "8"}, "num_hidden_layers is '8', but"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda value: str(value)[:50])
def test_bad_config(change, message):
    with pytest.raises(tt.InputError, match=message) as error:
        parse_config({name: value for name, value in (RAW | change).items() if value is not None})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["~nobody-of-this-name/x", None, 5, b"demo", "", "a\0b", "bad\udcff", "a" * 300])
def test_no_path(path):
    with pytest.raises(tt.InputError, match="is no path"):
        tt.load(path)


def test_key_that_stands_twice(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RAW).replace("{", '{"n_groups": 1, ', 1))
    with pytest.raises(tt.InputError, match="a key stands twice among n_groups, "):
        tt.load(tmp_path)


def test_config_that_is_no_object():
    with pytest.raises(tt.InputError, match="must hold an object"):
        parse_config([1])


def test_folders_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(tt.InputError, match=r"does not exist; give a model folder, .* comes with the package: demo"):
        tt.load(tmp_path / "nothing")
    with pytest.raises(tt.InputError, match=r"mid is a configuration without weights"):
        tt.load("mid")
    with pytest.raises(tt.InputError, match=r"it has no config.json"):
        tt.load(tmp_path)
    (tmp_path / "config.json").write_text("{'not json'}")
    with pytest.raises(tt.InputError, match=r"config.json is not JSON: .* line 1"):
        tt.load(tmp_path)
    with pytest.raises(tt.InputError, match="is a file; give the folder"):
        tt.load(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(tt.InputError, match="cannot read"):
        tt.load(tmp_path)
    with pytest.raises(tt.InputError, match="neither a folder here nor to be had from Hugging Face"):
        tt.load("nobody/nothing-at-all")


def test_hugging_face_id(tmp_path, monkeypatch, tiny):
    """An id is fetched by huggingface_hub: weights, config and tokenizer, no code and no pickles."""
    import huggingface_hub

    def snapshot_download(name, allow_patterns):
        assert name == "nvidia/some-model"
        assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in allow_patterns)
        return str(tiny.model_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    model = tt.load("nvidia/some-model", dtype="float32")
    assert model.config == tiny.model.config

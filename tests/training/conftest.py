"""A model of a few thousand parameters and a few lines of text to train it on."""

import json

import pytest
from conftest import DATA

from twotower_jax.training.config import read_training_config
from twotower_jax.training.start import Start

SMALL = {
    "hidden_size": 32,
    "hybrid_override_pattern": "M*E",
    "num_hidden_layers": 3,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "intermediate_size": 16,
    "vocab_size": 260,
    "eos_token_id": 14,
    "chunk_size": 8,
}

SETTINGS = """
output = "{output}"
model = "{model}"
objective = "{objective}"
dtype = "float32"
save_every = 3
log_every = 1
{more}
[data]
files = ["*.jsonl"]
tokenizer = "bytes"
length = 64
rows = 4
[[stages]]
steps = 4
block_size = 16
learning_rate = 1e-2
warmup = 2
"""

SECOND_STAGE = """
[[stages]]
steps = 4
block_size = 8
learning_rate = 1e-2
decay = 4
"""


@pytest.fixture
def home(tmp_path):
    """A folder with a fresh backbone's config and data."""
    raw = json.loads((DATA / "grouped-0" / "config.json").read_text())
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(raw | SMALL))
    lines = [{"prompt": f"say {n} =", "completion": f" {n} and {n + 1}\n"} for n in range(60)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.fixture
def settings(home):
    """Writes a run's file and reads it: settings(objective, output, model, more TOML lines, whether of two stages)."""

    def write(objective, output="run", model="base", more="", two_stages=False):
        file = home / f"{output}.toml"
        text = SETTINGS.format(objective=objective, output=output, model=model, more=more)
        file.write_text(text + SECOND_STAGE * two_stages)
        return read_training_config(file)

    return write


@pytest.fixture
def backbone(settings, home) -> str:
    """A backbone's folder, of random weights; `model` of a run."""
    start = Start(settings("ar"))
    start.export(start.trained(), home / "backbone")
    return "backbone"

"""A model of three layers, whose programs compile soon, and clocks that do not wait."""

import json

import pytest
from conftest import DATA

from twotower_jax.benchmark import clock, decoding, machine, subject


@pytest.fixture(scope="session")
def small_config(tmp_path_factory):
    """A config.json: one layer of each kind."""
    raw = json.loads((DATA / "tiny-0" / "config.json").read_text())
    file = tmp_path_factory.mktemp("small") / "config.json"
    file.write_text(json.dumps(raw | {"hybrid_override_pattern": "M*E", "num_hidden_layers": 3}))
    return str(file)


@pytest.fixture
def small(small_config) -> subject.Subject:
    found = subject.find(small_config, "float32")
    found.hold("context", "denoiser")
    return found


@pytest.fixture
def hasty(monkeypatch):
    """As few measurements as there can be."""
    for module, name, value in [
        (clock, "SHORTEST", 1e-9),
        (machine, "CPU_ARRAY", 2**16),
        (machine, "CPU_MATRIX", 64),
        (decoding, "RUNS", 1),
    ]:
        monkeypatch.setattr(module, name, value)

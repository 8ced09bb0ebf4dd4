"""A model of two layers, whose programs compile soon, and clocks that do not wait."""

import functools
import json

import jax
import pytest
from conftest import DATA

from twotower_jax.benchmark import clock, decoding, machine, rows, subject
from twotower_jax.parameters import initialize

ROWS, CONTEXT, CAPACITY, SIZE, MASK = 3, 32, 128, 16, 3


@pytest.fixture(scope="session")
def small_config(tmp_path_factory):
    """A config.json."""
    raw = json.loads((DATA / "tiny-0" / "config.json").read_text())
    file = tmp_path_factory.mktemp("small") / "config.json"
    file.write_text(json.dumps(raw | {"hybrid_override_pattern": "ME", "num_hidden_layers": 2}))
    return str(file)


@pytest.fixture(scope="session")
def small(small_config) -> subject.Subject:
    found = subject.find(small_config, "float32")
    made = functools.partial(initialize, found.description, found.config, dtype=found.dtype)
    found.params |= jax.jit(made)(jax.random.key(0))  # one program, where `hold` makes many
    return found


@pytest.fixture(scope="session")
def small_rows(small) -> rows.ReadRows:
    return reader(small).read(small.params, ROWS, CONTEXT)


def reader(small) -> rows.Reader:
    return rows.Reader(small.programs, small.config, small.group, CAPACITY, SIZE, MASK)


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

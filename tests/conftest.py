"""Golden checkpoints and what NVIDIA's reference printed for them (see tests/data/README.md)."""

import atexit
import functools
import gc
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import twotower_jax as tt

DATA = Path(__file__).parent / "data"

# A program that several tests need, in this process or in those they start, is compiled once a run.
if "PYTEST_XDIST_WORKER" in os.environ:
    PROGRAMS = os.environ["XDG_CACHE_HOME"]
else:
    PROGRAMS = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, PROGRAMS, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = PROGRAMS
for name, value in {"jax_compilation_cache_dir": PROGRAMS, "jax_persistent_cache_min_compile_time_secs": 0.3}.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # to compile for GPUs (`targets`) where there are none


@functools.cache
def load(name: str, dtype: str = "float32") -> tt.Model:
    """A golden checkpoint, or a shipped model."""
    return tt.load(DATA / name if (DATA / name).is_dir() else name, dtype=dtype)


def write_broken_model(folder: Path) -> None:
    """tiny-0, but the context tower's embedding of token 9 is not finite."""
    everything = {}
    for file in (DATA / "tiny-0").glob("*.safetensors"):
        everything |= load_file(file)
    everything["context_tower.embeddings.weight"][9] = np.nan
    save_file(everything, folder / "model.safetensors")
    shutil.copy(DATA / "tiny-0" / "config.json", folder)


class Golden:
    """A golden checkpoint with its numbers: `golden["context/row0/logits"]`, `golden.prompt(0)`, `golden.model`."""

    rows = range(4)

    def __init__(self, name: str):
        self.name = name
        self.model_folder = DATA / name
        self.model = load(name)
        self._arrays = np.load(DATA / name / "golden.npz")

    def __getitem__(self, key: str) -> np.ndarray:
        return self._arrays[key]

    @property
    def names(self) -> list[str]:
        return self._arrays.files

    def prompt(self, row: int) -> np.ndarray:
        return self[f"prompt/row{row}"]

    @property
    def prompts(self) -> list[np.ndarray]:
        return [self.prompt(row) for row in self.rows]


golden_of = functools.cache(Golden)


@pytest.fixture(params=["tiny-0", "grouped-0"])
def golden(request) -> Golden:
    """Each golden TwoTower."""
    return golden_of(request.param)


@pytest.fixture
def tiny() -> Golden:
    return golden_of("tiny-0")


@pytest.fixture(scope="session")
def task_prompts() -> list[dict]:
    """Of trained-0: prompts, right answers, and the reference's tokens by mode."""
    return json.loads((DATA / "trained-0" / "prompts.json").read_text())


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def byte_ids(text: str) -> list[int]:
    """The tokenizer of trained-0 and of the shipped model: a byte plus 4."""
    return [byte + 4 for byte in text.encode()]


def largest_difference(a, b) -> float:
    """Over all leaves of two trees of the same structure."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a, b)))


@pytest.fixture(scope="module", autouse=True)
def fresh_programs():
    """Lets go of compiled programs after each file; with those of the whole suite alive XLA's CPU compiler crashed."""
    yield
    load.cache_clear()
    golden_of.cache_clear()
    jax.clear_caches()
    gc.collect()

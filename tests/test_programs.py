"""Where compiled programs are kept."""

import os
import subprocess
import sys

import jax
import pytest
from conftest import DATA

from twotower_jax import programs
from twotower_jax.programs import keep_between_runs


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """cache(backend, folder before) is the cache's folder after."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def keep(backend, folder):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        jax.config.update("jax_compilation_cache_dir", folder)
        keep_between_runs()
        return jax.config.jax_compilation_cache_dir

    yield keep
    for name, value in before.items():
        jax.config.update(name, value)


def test_cache(cache, tmp_path, monkeypatch):
    """In the user's cache folder, unless another is given; CPUs of two kinds do not share."""
    assert cache("gpu", None) == str(tmp_path / "twotower_jax")
    assert cache("tpu", "elsewhere") == "elsewhere"
    one = cache("cpu", None)
    assert one.startswith(str(tmp_path / "twotower_jax" / "cpu-"))
    assert cache("cpu", None) == one
    monkeypatch.setattr(programs, "_this_cpu", lambda: "another")
    assert cache("cpu", None) != one
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache("cpu", None) is None


def test_second_start(tmp_path):
    """A second start of the command compiles nothing: it adds no file to the cache."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "-m", "twotower_jax.cli", "generate", str(DATA / "tiny-0"), "--ids", "5,7,9"]

    def run():
        environment = outside | {"XDG_CACHE_HOME": str(tmp_path)}
        done = subprocess.run([*command, "--max-new-tokens", "16"], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return {file.name: file.stat().st_mtime_ns for file in tmp_path.rglob("*-cache")}

    first = run()
    assert any("denoise" in name for name in first)
    assert run() == first

"""Where compiled programs are kept."""

import jax
import pytest

from twotower_jax.programs import keep_between_runs


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """cache(backend, folder before) is the cache's folder after."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def keep(backend, folder):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        jax.config.update("jax_compilation_cache_dir", folder)
        keep_between_runs()
        return jax.config.jax_compilation_cache_dir

    yield keep
    jax.config.update("jax_compilation_cache_dir", before)


def test_cache(cache, tmp_path):
    """In the user's cache folder, for devices whose programs take long, unless another is given."""
    assert cache("gpu", None) == str(tmp_path / "twotower_jax")
    assert cache("tpu", "elsewhere") == "elsewhere"
    assert cache("cpu", None) is None

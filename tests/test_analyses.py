"""What a compiler said, kept between runs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from twotower_jax.analyses import analysis


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    return tmp_path / "twotower_jax" / "plans"


def lowered(size=256):
    return jax.jit(lambda x: jnp.tanh(x) @ x).lower(jnp.ones((size, size)))


def test_kept(home):
    """The same program for the same compilers is compiled once."""
    first = analysis(lowered(), "a")
    assert not first.kept
    assert first.arguments == first.outputs == 256 * 256 * 4
    assert first.temporaries > 0
    assert "dot" in first.text
    assert analysis(lowered(), "a") == dataclasses.replace(first, kept=True)


def test_another_one(home, monkeypatch):
    """Another program, compiler or setting is compiled anew."""
    analysis(lowered(), "a")
    assert not analysis(lowered(), "b").kept
    assert not analysis(lowered(128), "a").kept
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    assert not analysis(lowered(), "a").kept


@pytest.mark.parametrize("damage", ["cut", "turned", "no gzip"])
def test_damaged(home, damage):
    analysis(lowered(), "a")
    (file,) = home.iterdir()
    whole = file.read_bytes()
    turned = whole[:50] + bytes([whole[50] ^ 255]) + whole[51:]
    file.write_bytes({"cut": whole[:100], "turned": turned, "no gzip": b"{}"}[damage])
    assert not analysis(lowered(), "a").kept
    assert analysis(lowered(), "a").kept


def test_no_folder(home):
    """Nothing is kept then, and nothing is lost."""
    home.parent.write_text("")
    assert not analysis(lowered(), "a").kept
    assert not analysis(lowered(), "a").kept

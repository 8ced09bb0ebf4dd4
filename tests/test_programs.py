"""Programs are compiled beside one another, and once; where they are kept."""

import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DATA, load

from twotower_jax import programs
from twotower_jax.engine.request import Request
from twotower_jax.placement import Placement, place
from twotower_jax.programs import Program, Programs, keep_between_runs
from twotower_jax.shapes import Shapes, shapes_of
from twotower_jax.sharding import WHOLE

TIMES = Program(lambda config, x, *, by: x * by, (WHOLE,), WHOLE)


@pytest.fixture
def group():
    config = load("tiny-0").config
    return place(Placement((0,), (0,)), config, two_towers=True).context


@pytest.fixture
def compiled(monkeypatch):
    """The threads that compiled something, one after the other."""
    found, original = [], programs._compiled

    def noted(lowered):
        found.append(threading.current_thread())
        return original(lowered)

    monkeypatch.setattr(programs, "_compiled", noted)
    return found


def test_side_by_side(monkeypatch, group):
    """No compilation ends before another has begun."""
    monkeypatch.setattr(programs, "cores", lambda: 2)
    both, original = threading.Barrier(2, timeout=60), programs._compiled
    monkeypatch.setattr(programs, "_compiled", lambda lowered: (both.wait(), original(lowered))[1])
    made = Programs()
    for by in (2, 3):
        made.ahead(group, TIMES, jnp.ones(3), by=by)
    made.finish()
    assert not both.broken


def test_what_was_begun_is_run(group, compiled):
    """Shapes alone begin it; arrays on an equal group of devices find it, and nobody waits for it again."""
    made, x = Programs(), group.put(np.ones(3, np.float32), WHOLE)
    outputs = made.ahead(Shapes.like(group), TIMES, shapes_of(x), by=2)
    assert (outputs.shape, outputs.dtype) == (x.shape, x.dtype)
    assert (made.run(group, TIMES, x, what="", by=2) == 2).all()
    spent = made.compile_seconds
    assert spent > 0
    assert (made.run(group, TIMES, x, what="", by=2) == 2).all()
    made.ahead(group, TIMES, x, by=2)
    assert made.compile_seconds == spent
    assert len(compiled) == 1


def test_an_error_ends_what_waits(monkeypatch, group):
    """It is the asker's, who may ask again; what had not begun is not compiled."""
    monkeypatch.setattr(programs, "cores", lambda: 1)
    began, goes_on, original = [], threading.Event(), programs._compiled

    def broken(lowered):
        began.append(lowered)
        if len(began) == 1:
            raise RuntimeError("no such instruction")
        goes_on.wait(60)
        return original(lowered)

    monkeypatch.setattr(programs, "_compiled", broken)
    made, x = Programs(), group.put(np.ones(3, np.float32), WHOLE)
    for by in (2, 3, 4, 5):
        made.ahead(group, TIMES, x, by=by)
    with pytest.raises(RuntimeError, match="no such instruction"):
        made.run(group, TIMES, x, what="", by=2)
    goes_on.set()
    assert (made.run(group, TIMES, x, what="", by=2) == 2).all()
    made.finish()
    assert len(began) <= 3  # the first, what was at work when it was heard of, and the first again


def test_an_engine_compiles_all_ahead(monkeypatch, compiled):
    """Nothing is compiled but what is begun when the engine is made, and a second one compiles nothing."""
    model = load("tiny-0")
    monkeypatch.setattr(model, "programs", Programs())
    requests = [
        Request(i, [5, 7, 9 + i], mode, max_new_tokens=20).checked(model.config.vocab_size, True)
        for i, mode in enumerate(["ar", "diffusion", "ar"])
    ]
    for _ in range(2):
        engine = model.engine_for(requests, slots=2)
        begun = set(model.programs._begun)
        for event in engine.run(requests):
            assert event.error is None
        assert set(model.programs._begun) == begun == set(model.programs._running)
        assert len(compiled) == len(begun)


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


def test_cache(cache, tmp_path, monkeypatch, caplog):
    """In the user's cache folder, unless another is given; CPUs of two kinds do not share; none is told of."""
    assert cache("gpu", None) == str(tmp_path / "twotower_jax")
    assert cache("tpu", "elsewhere") == "elsewhere"
    one = cache("cpu", None)
    assert one.startswith(str(tmp_path / "twotower_jax" / "cpu-"))
    assert cache("cpu", None) == one
    monkeypatch.setattr(programs, "_this_cpu", lambda: "another")
    assert cache("cpu", None) != one
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not caplog.records
    assert cache("cpu", None) is None
    assert f"cannot be kept in {tmp_path / 'file'}" in caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert programs.cache_folder().is_absolute()


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

"""Rows and parameters over several devices and processes: the same run, within float error."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import largest_difference

import twotower_jax as tt
from twotower_jax import distributed
from twotower_jax.distributed import join


@pytest.fixture
def command(settings, home, backbone):
    """command(output, more steps, more TOML lines) writes a run of 16 rows a step and gives what starts it."""

    def write(output, steps=4, more="accumulate = 2"):
        settings("denoise", output, backbone, more=more)
        file = home / f"{output}.toml"
        file.write_text(file.read_text().replace("rows = 4", "rows = 16").replace("steps = 4", f"steps = {steps}"))
        return [sys.executable, "-m", "twotower_jax.cli", "train", str(file)]

    return write


def devices(count):
    """An environment with so many of them."""
    return os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}


def curve(folder):
    with open(folder / "metrics.jsonl") as lines:
        return [json.loads(line)["loss"] for line in lines if line.endswith("\n")]


def together(command, processes=2):
    """The processes of one job, of two devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        job = ["--coordinator", f"localhost:{free.getsockname()[1]}", "--processes", str(processes)]
    return [
        subprocess.Popen([*command, *job, "--process", str(i)], env=devices(2), stderr=subprocess.PIPE, text=True)
        for i in range(processes)
    ]


def statuses(jobs):
    """How each process ended; one that never would is killed."""
    try:
        return [job.communicate(timeout=200) and job.returncode for job in jobs]
    finally:
        for job in jobs:
            job.kill()


def test_devices_and_processes_are_one(command, home):
    """One device; eight, otherwise divided too; two processes of two. The model is the same too, written once."""
    subprocess.run(command("one"), check=True, env=devices(1), capture_output=True)
    subprocess.run(command("eight"), check=True, env=devices(8), capture_output=True)
    mesh = ["--mesh", "data=2,expert=2,tensor=2"]
    subprocess.run([*command("mesh"), *mesh], check=True, env=devices(8), capture_output=True)
    jobs = together(command("job"))
    assert statuses(jobs) == [0, 0]
    assert len(curve(home / "one")) == 4
    for name in "eight", "mesh", "job":
        np.testing.assert_allclose(curve(home / "one"), curve(home / name), rtol=2e-5)
        models = [tt.load(home / folder / "model", dtype="float32").params for folder in ("one", name)]
        assert largest_difference(*models) < 2e-3


@pytest.mark.slow
def test_processes_stop_and_go_on_as_one(command, home):
    """A signal to one process of a job ends all of them with a checkpoint, and one process alone goes on."""
    whole = command("whole", steps=60)
    subprocess.run(whole, check=True, env=devices(1), capture_output=True)
    stopped = command("stopped", steps=60)
    jobs = together(stopped)
    metrics = home / "stopped" / "metrics.jsonl"
    while not metrics.exists() or len(curve(home / "stopped")) < 5:
        assert jobs[1].poll() is None
        time.sleep(0.02)
    jobs[1].send_signal(signal.SIGTERM)
    assert statuses(jobs) == [130, 130]
    done = len(curve(home / "stopped"))
    assert done < 60
    subprocess.run(stopped, check=True, env=devices(1), capture_output=True)
    np.testing.assert_allclose(curve(home / "whole")[: done + 1], curve(home / "stopped")[: done + 1], rtol=1e-3)
    assert len(curve(home / "stopped")) == 60


def test_bad_mesh(command):
    """The command's mesh is the run's."""
    done = subprocess.run([*command("bad"), "--mesh", "expert=3"], env=devices(2), capture_output=True, text=True)
    assert done.returncode == 2
    assert "mesh expert=3 is of 3 devices, not of 2" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, None), "need --coordinator"),
        (("auto", 2, 0), "by itself"),
        (("here:1", 2, None), "needs --processes and --process"),
        (("here:1", 2, 2), "--process 2 must be from 0 to 1"),
        (("here:1", 0, 0), "--processes 0 must be 1 or more"),
        (("here:99999", 2, 0), "takes HOST:PORT or auto, not here:99999"),
        (("here", 2, 0), "takes HOST:PORT or auto, not here"),
    ],
)
def test_bad_jobs(arguments, message):
    with pytest.raises(tt.InputError, match=message):
        join(*arguments)


def test_nobody_there(monkeypatch):
    monkeypatch.setattr(distributed, "SECONDS", 0.1)
    with socket.socket() as free:
        free.bind(("localhost", 0))  # bound, and not listening
        with pytest.raises(tt.InputError, match=r"nobody answers at localhost:\d+ after 0.1 s"):
            join(f"localhost:{free.getsockname()[1]}", 2, 1)

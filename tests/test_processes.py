"""Two processes of two devices each: the tokens of one device, whichever process has which tower."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import DATA, load
from jobs import good, results, run, write

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [4]]


def start(port, *options, second=(), models=(DATA / "tiny-0",) * 2, devices=(2, 2)):
    """`generate` in two processes; the second has other options, and each a model and a number of devices."""
    command = [sys.executable, "-m", "twotower_jax.cli", "generate", "--dtype", "float32"]
    for prompt in PROMPTS:
        command += ["--ids", ",".join(map(str, prompt))]
    command += ["--max-new-tokens", "20", "--json", "--coordinator", f"localhost:{port}", "--processes", "2", *options]
    jobs = []
    for i, more in enumerate(([], second)):
        flags = f"--xla_force_host_platform_device_count={devices[i]}"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        jobs.append(subprocess.Popen([*command, models[i], "--process", str(i), *more], env=environment, **pipes))
    return jobs


def ends(jobs):
    """What they say, and their exit statuses."""
    try:
        said = [job.communicate(timeout=240) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert "Traceback" not in said[0][1] + said[1][1]
    return said, [job.returncode for job in jobs]


@pytest.mark.parametrize(
    "where",
    [
        pytest.param([], id="a tower in each", marks=pytest.mark.slow),
        pytest.param(
            ["--context-devices", "0,2", "--denoiser-devices", "1,3", "--mesh", "tensor=2"], id="both in both"
        ),
    ],
)
def test_tokens_of_one_device(where, free_port):
    said, statuses = ends(start(free_port, *where))
    assert statuses == [0, 0], said[0][1][-3000:]
    assert said[1][0] == ""  # one process speaks, of the result alone
    expected = load("tiny-0").generate_mask_diffusion(PROMPTS, 20)
    rows = json.loads(said[0][0])["rows"]
    assert [row["tokens"] for row in rows] == expected.tokens
    assert [row["forwards"] for row in rows] == expected.forwards


def test_a_process_without_a_device(free_port):
    said, statuses = ends(start(free_port, "--context-devices", "0", "--denoiser-devices", "1"))
    assert statuses == [2, 2]
    for _, error in said:
        assert "process 1 has none of the towers' devices; give each process some, or start fewer" in error


@pytest.mark.parametrize(
    ("second", "first_says", "second_says"),
    [
        (
            ["--mesh", "tensor=2"],
            "process 1 was told something else than process 0",
            "process 1 was told something else",
        ),
        (["--prompt-file", "/nowhere"], "process 1 was refused; it says why", "cannot read /nowhere"),
    ],
)
def test_processes_that_disagree(free_port, second, first_says, second_says):
    """All end with a line, where some would wait for ever."""
    said, statuses = ends(start(free_port, second=second))
    assert statuses == [2, 2]
    assert first_says in said[0][1]
    assert second_says in said[1][1]


def test_processes_with_other_files(free_port, tmp_path):
    """A stale copy on one machine: what the towers say would be of neither model."""
    stale = tmp_path / "tiny-0"
    shutil.copytree(DATA / "tiny-0", stale)
    raw = json.loads((stale / "config.json").read_text())
    (stale / "config.json").write_text(json.dumps(raw | {"layer_norm_epsilon": 0.01}))
    said, statuses = ends(start(free_port, models=(DATA / "tiny-0", stale)))
    assert statuses == [2, 2]
    assert "process 1 was told something else than process 0; give all the same options, and the same" in said[0][1]


def test_processes_with_other_numbers_of_devices(free_port):
    said, statuses = ends(start(free_port, devices=(1, 2)))
    assert statuses == [2, 2]
    assert all("the processes have 1, 2 devices; give each as many" in error for _, error in said)


@pytest.mark.slow
def test_a_batch_job(free_port, tmp_path):
    """One engine over two processes of two devices: the lines of one device, written once."""
    source, target = write(tmp_path / "in.jsonl", [*map(good, range(40)), b"not JSON"]), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "twotower_jax.cli", "batch", source, str(target), "--model", DATA / "tiny-0"]
    command += ["--dtype", "float32", "--slots", "8", "--coordinator", f"localhost:{free_port}", "--processes", "2"]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    said, statuses = ends([subprocess.Popen([*command, "--process", str(i)], **pipes) for i in range(2)])
    assert statuses == [1, 1], said  # a line was wrong
    assert "40 results and 1 errors of 41 lines" in said[0][1]
    assert said[1][1].count("results and") == 0
    run(source, tmp_path / "alone.jsonl")
    assert results(target) == results(tmp_path / "alone.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_ends(free_port, number):
    """One that is told to leave does; the other says that it is gone."""
    jobs = start(free_port, "--mode", "mock-ar", "--max-new-tokens", "20000", "--eos-token-id", "none")
    time.sleep(30)
    assert [job.poll() for job in jobs] == [None, None]
    jobs[1].send_signal(number)
    said, statuses = ends(jobs)
    assert statuses[0] != 0
    assert "twotower: the devices gave up" in said[0][1] or statuses[0] < 0
    assert statuses[1] == (130 if number == signal.SIGTERM else -number)

"""Two processes of two devices each: the tokens of one device, whichever process has which tower."""

import json
import os
import subprocess
import sys

import pytest
from conftest import DATA, load

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [4]]


def together(port, *options):
    """What `generate` of two processes says: the first one's output, and both processes' exit statuses."""
    command = [sys.executable, "-m", "twotower_jax.cli", "generate", str(DATA / "tiny-0"), "--dtype", "float32"]
    for prompt in PROMPTS:
        command += ["--ids", ",".join(map(str, prompt))]
    command += ["--max-new-tokens", "20", "--json", "--coordinator", f"localhost:{port}", "--processes", "2", *options]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    jobs = [subprocess.Popen([*command, "--process", str(i)], **pipes) for i in range(2)]
    try:
        said = [job.communicate(timeout=240) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    return said, [job.returncode for job in jobs]


@pytest.mark.parametrize(
    "where",
    [
        pytest.param([], id="a tower in each"),
        pytest.param(
            ["--context-devices", "0,2", "--denoiser-devices", "1,3", "--mesh", "tensor=2"], id="both in both"
        ),
    ],
)
def test_tokens_of_one_device(where, free_port):
    said, statuses = together(free_port, *where)
    assert statuses == [0, 0], said[0][1][-3000:]
    (first,) = [line for line in said[0][0].splitlines() if line.startswith("{")]
    assert not [line for line in said[1][0].splitlines() if line.startswith("{")]  # one process speaks
    expected = load("tiny-0").generate_mask_diffusion(PROMPTS, 20)
    rows = json.loads(first)["rows"]
    assert [row["tokens"] for row in rows] == expected.tokens
    assert [row["forwards"] for row in rows] == expected.forwards


def test_a_process_without_a_device(free_port):
    said, statuses = together(free_port, "--context-devices", "0", "--denoiser-devices", "1")
    assert statuses == [2, 2]
    for _, error in said:
        assert "process 1 has none of the towers' devices; give each process some, or start fewer" in error
        assert "Traceback" not in error

"""Runs `eight_devices/` in a process that has eight CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def run(mark):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-m", mark, str(TESTS / "eight_devices")]
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "skipped" not in done.stdout


def test_eight_devices():
    run("not slow")


@pytest.mark.slow
def test_more_on_eight_devices():
    run("slow")

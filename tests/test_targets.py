"""Devices that are not there."""

import json
import subprocess
import sys

import pytest
from conftest import DATA

import twotower_jax as tt
from twotower_jax.targets import missing, target


@pytest.mark.parametrize(
    "text", ["", "h100", "h100x0", "h300x2", "v5e:0x4", "v5e:4", "v9:2x2", "h100x2x2", "v5e:2x2x2x2"]
)
def test_unknown_devices(text):
    with pytest.raises(tt.InputError, match="known are h100xN, h200xN, v4:NxN"):
        target(text)


def run(*options):
    command = [sys.executable, "-m", "twotower_jax.cli", "plan", *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_plan():
    """By the real compiler, or by the CPU's, which is said then."""
    done = run(str(DATA / "tiny-0"), "--devices", "h100x2", "--rows", "4", "--context", "64", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    stands_in = bool(missing("h100x2"))
    assert ("compiled for CPU devices instead" in plan["note"]) == stands_in
    assert ("compiled for CPU devices instead" in done.stderr) == stands_in
    assert list(plan["programs"]["context"]) == ["read_apart", "feed_apart", "seat"]
    assert list(plan["programs"]["denoiser"]) == ["denoise", "absorb", "follow", "seat"]
    assert plan["needed"]["context"] > plan["parameters"]["context"] > 10**5
    assert "context: feed_apart, compiled in" in done.stderr


def test_what_does_not_fit():
    """The exit status tells a script so."""
    options = [str(DATA / "tiny-0"), "--devices", "h100x1", "--rows", "1000000", "--context", "2048"]
    done = run(*options, "--mode", "ar", "--json")
    assert (done.returncode, json.loads(done.stdout)["fits"]) == (1, False), done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([str(DATA / "tiny-0"), "--devices", "h100x2", "--rows", "0"], "--rows"),
        ([str(DATA / "tiny-0"), "--devices", "h100x2", "--context", "8"], "--block-size must be from 1 to 8"),
        ([str(DATA / "tiny-0"), "--devices", "v5e:32x4"], "v5e has 2 axes of up to 16 chips, as in v5e:4x4"),
        ([str(DATA / "tiny-0"), "--devices", "v6e:2x2x2"], "v6e has 2 axes of up to 16 chips"),
        ([str(DATA / "tiny-0"), "--devices", "h100x2", "--mesh", "expert=3"], "mesh expert=3 is of 3 devices"),
        (["nowhere", "--devices", "h100x2"], "nowhere does not exist"),
    ],
)
def test_bad_plans(options, message):
    done = run(*options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr

"""A signal waits for the end of what must not be cut."""

import signal
import subprocess
import sys
import threading

import pytest

from twotower_jax import interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_waits(number):
    arrived, done = [], []
    before = signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        with interrupts.deferred():
            signal.raise_signal(number)
            assert not arrived
            done.append(True)
        assert (arrived, done) == ([number], [True])
        signal.raise_signal(number)
        assert arrived == [number] * 2
    finally:
        signal.signal(number, before)


def test_interrupt_is_raised_at_the_end():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    reached = []

    def work():
        with interrupts.deferred():
            signal.raise_signal(signal.SIGINT)
            reached.append(True)

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGINT, before)
    assert reached


def test_other_threads_pass():
    passed = []

    def work():
        with interrupts.deferred():
            passed.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert passed


def test_what_does_not_end_is_left():
    """Soon after the time that was given, whatever the process waits for."""
    code = """
import time
from twotower_jax import interrupts
interrupts.AT_ONCE = 0.5
with interrupts.Stop(0.5, "farewell"):
    print("ready", flush=True)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(1)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "farewell"

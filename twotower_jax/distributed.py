"""Several processes as one job."""

import collections
import contextlib
import hashlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from twotower_jax.errors import InputError

SECONDS = 300  # that processes wait for the first one


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Joins the job, before anything else uses a device; does nothing when no argument is given.

    Args:
      coordinator: HOST:PORT of the first process, the same in all; or "auto", where JAX knows the launcher (SLURM,
        Open MPI, Kubernetes, TPU pods).
      processes: how many there are.
      process: which one this is, from 0.

    Raises:
      InputError: the job cannot be joined.
    """
    if coordinator is None:
        if processes is not None or process is not None:
            raise InputError("--processes and --process need --coordinator HOST:PORT")
        return
    if coordinator == "auto":
        if processes is not None or process is not None:
            raise InputError("--coordinator auto finds --processes and --process by itself")
    elif processes is None or process is None:
        raise InputError(f"--coordinator {coordinator} needs --processes and --process")
    elif processes < 1:
        raise InputError(f"--processes {processes} must be 1 or more")
    elif not 0 <= process < processes:
        raise InputError(f"--process {process} must be from 0 to {processes - 1}")
    host, _, port = coordinator.rpartition(":")
    if coordinator != "auto" and not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise InputError(f"--coordinator takes HOST:PORT or auto, not {coordinator}")
    if process:
        _await(host, int(port))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if coordinator == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        if coordinator == "auto":
            raise InputError(f"--coordinator auto finds no launcher that JAX knows ({first}); give HOST:PORT") from None
        raise InputError(f"cannot join the job at {coordinator}: {first}") from None
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)  # JAX has put its own in the place of SIGTERM's
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        each = ", ".join(str(counts[i]) for i in range(jax.process_count()))
        raise InputError(f"the processes have {each} devices; give each as many")


def joined() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this process speaks and writes for the job, or is all of it."""
    return not joined() or jax.process_index() == 0


@contextlib.contextmanager
def checked_together() -> Iterator[list]:
    """Checks that every process of the job makes alike: none goes on where another was refused, or was told otherwise.

    Without this the others would wait for ever, in a sum over devices that one never comes to.

    Yields:
      a list, to which the body adds what all must have been told alike.

    Raises:
      InputError: what a check in this process raised; that another's did; that another was told something else.
    """
    refusal, said = None, []
    try:
        yield said
    except InputError as error:
        refusal = error
    if joined():
        digest = np.frombuffer(hashlib.sha256(repr(said).encode()).digest(), np.uint8)
        found = multihost_utils.process_allgather(np.append(digest, np.uint8(refusal is not None)))
        if refusal is None and found[:, -1].any():
            raise InputError(f"process {int(np.argmax(found[:, -1]))} was refused; it says why")
        if refusal is None and (found != found[0]).any():
            other = int(np.argmax((found != found[0]).any(-1)))
            raise InputError(
                f"process {other} was told something else than process 0; give all the same options, and the same files"
            )
    if refusal is not None:
        raise refusal


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """In a job, what libraries print on standard output goes to standard error: output is for the result."""
    if not joined():
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _await(host: str, port: int) -> None:
    """Until the first process is there: JAX, which waits as long, then ends the process with a native trace."""
    end = time.monotonic() + SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise InputError(f"nobody answers at {host}:{port} after {SECONDS} s: {error}") from None
        time.sleep(0.2)

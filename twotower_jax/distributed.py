"""Several processes as one job."""

import socket
import time

import jax

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
    try:
        if coordinator == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise InputError(f"cannot join the job at {coordinator}: {first}") from None


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

"""Several processes as one job."""

import jax

from twotower_jax.errors import InputError


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
    elif not 0 <= process < processes:
        raise InputError(f"--process {process} must be from 0 to {processes - 1}")
    host, _, port = coordinator.rpartition(":")
    if coordinator != "auto" and not (host and port.isdecimal()):
        raise InputError(f"--coordinator takes HOST:PORT or auto, not {coordinator}")
    try:
        if coordinator == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, processes, process)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise InputError(f"cannot join the job at {coordinator}: {first}") from None

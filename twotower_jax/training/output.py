"""A run's folder: what may stand in it, and that one job at a time writes to it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from twotower_jax.errors import InputError
from twotower_jax.publishing import LOCK, lock


@contextlib.contextmanager
def claimed(output: Path, model: Path) -> Iterator[None]:
    """The folder of a run that starts from the folder `model`, made if need be, for this job alone.

    Raises:
      InputError: it cannot be written; another job writes to it; or what is in it is no run's.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output {output} cannot be made: {error.strerror}") from None
    for name in ("checkpoints", "tensorboard", "model"):
        if (output / name).exists() and not (output / name).is_dir():
            raise InputError(f"{output / name} is a file, where a run has a folder; give another output")
    if (output / "metrics.jsonl").is_dir():
        raise InputError(f"{output / 'metrics.jsonl'} is a folder, where a run has a file; give another output")
    made = output / "model"
    if made.exists() and made.samefile(model):
        raise InputError(f"{made} is the model that the run starts from and would write; give another output")
    if made.exists() and not (output / "checkpoints").is_dir():
        raise InputError(f"{made} is there, but the run that made it is not; give another output")
    if jax.process_index() != 0:
        yield
        return
    try:
        (output / LOCK).touch()
    except OSError as error:
        raise InputError(f"output {output} cannot be written: {error.strerror}") from None
    with open(output / LOCK, "w") as file:
        try:
            lock(file)
        except BlockingIOError:
            raise InputError(f"{output} is being trained by another process; wait for it, or stop it") from None
        except OSError:  # a file system without locks
            pass
        yield

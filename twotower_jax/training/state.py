"""What a run is between two steps: at its beginning, and in its checkpoints."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from twotower_jax.checkpoint import TrainingCheckpoints
from twotower_jax.errors import InputError
from twotower_jax.publishing import absent
from twotower_jax.training.config import TrainingConfig
from twotower_jax.training.data import beginning
from twotower_jax.training.optimizer import make_optimizer
from twotower_jax.training.start import Start

FREE = ("output", "model", "save_every", "keep", "log_every")  # settings that may change when a run goes on


@dataclasses.dataclass
class State:
    """What a checkpoint holds: updates done, where the data goes on, and the arrays."""

    step: int
    position: np.ndarray
    trained: Any
    optimizer: Any


def begin(c: TrainingConfig, start: Start, checkpoints: TrainingCheckpoints, step: int | None = None) -> State:
    """A run at one of its checkpoints (by default the newest), or at its beginning if there is none.

    Raises:
      InputError: the checkpoints are another run's, or have no such step.
    """
    optimizer = make_optimizer(c)
    trained = start.trained()
    state = State(0, beginning(c.data.rows), trained, start.placement.optimizer_state(optimizer, trained))
    step = checkpoints.latest if step is None else step
    if step is None:
        return state
    extra = checkpoints.extra(step)
    _require_same(describe(c, start), extra["config"], Path(c.output))
    trained, optimizer = checkpoints.load(step, (trained, state.optimizer))
    return State(step, np.asarray(extra["position"], np.int64), trained, optimizer)


def export(c: TrainingConfig, start: Start, target: Path, step: int | None = None) -> int:
    """Writes the model as it is at a checkpoint of a run, finished or not.

    Args:
      c: the run.
      start: where it began.
      target: the folder to write.
      step: of the checkpoint; the newest by default.

    Returns:
      the step.

    Raises:
      InputError: the run has no such checkpoint, or is another one; `target` is there already.
    """
    folder = Path(c.output) / "checkpoints"
    absent(target)
    if not folder.is_dir():
        raise InputError(f"{c.output} holds no run; train it first")
    checkpoints = TrainingCheckpoints(folder, c.keep, reads_only=True)
    try:
        if step is not None and step not in checkpoints.steps:
            known = ", ".join(map(str, checkpoints.steps)) or "none"
            raise InputError(f"{folder} has no checkpoint of step {step}; there are {known}")
        state = begin(c, start, checkpoints, step)
    finally:
        checkpoints.close()
    start.export(state.trained, target)
    return state.step


def describe(c: TrainingConfig, start: Start) -> dict[str, Any]:
    """What must not change between a run and its continuation, wherever its folders have been moved to."""
    raw = {name: value for name, value in dataclasses.asdict(c).items() if name not in FREE}
    data = raw.pop("data")
    for i, stage in enumerate(raw.pop("stages")):
        raw |= {f"stages[{i}].{name}": value for name, value in stage.items()}
    raw |= {f"data.{name}": value for name, value in data.items() if name not in ("files", "tokenizer")}
    dimensions = dataclasses.asdict(start.config)
    del dimensions["shards"], dimensions["whole"]  # of where it runs
    raw |= {f"model's {name}": value for name, value in dimensions.items()}
    raw |= {"model": start.fingerprint, "tokenizer": start.tokenizer_fingerprint}
    raw |= {"data.files": start.documents.names, "number of documents": len(start.documents)}
    return json.loads(json.dumps(raw))


def _require_same(ours: dict[str, Any], theirs: dict[str, Any], output: Path) -> None:
    for name in [*ours, *theirs.keys() - ours]:
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"{output} holds a run with another {name} ({theirs.get(name)}, here {ours.get(name)}); "
                "continue it as it was, or give another output"
            )

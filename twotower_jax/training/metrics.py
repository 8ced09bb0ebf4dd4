"""What a run says of itself while it goes on."""

import json
from pathlib import Path

from tensorboardX import SummaryWriter


class Metrics:
    """`metrics.jsonl` and `tensorboard/`; of a run that goes on from an earlier step, the later lines are dropped."""

    def __init__(self, folder: Path, step: int):
        self._file = folder / "metrics.jsonl"
        lines = self._file.read_text(errors="replace").splitlines() if self._file.is_file() else []
        kept = [line for line in lines if _step_of(line) <= step]
        unfinished = self._file.with_suffix(".tmp")
        unfinished.write_text("".join(line + "\n" for line in kept))
        unfinished.replace(self._file)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        with open(self._file, "a") as handle:
            handle.write(json.dumps({"step": step} | values) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


def _step_of(line: str) -> float:
    """A line's step; infinity for one that was cut when the process ended."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")

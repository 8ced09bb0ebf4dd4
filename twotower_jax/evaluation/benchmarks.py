"""The eleven benchmarks that NVIDIA published figures for (paper, table of results), as tasks of the harness."""

import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path

from lm_eval.tasks import TaskManager

from twotower_jax.errors import InputError

HERE = Path(__file__).parent
TASKS = HERE / "tasks"  # in the harness's own format


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A task of the harness, and how it is run.

    Attributes:
      name: as the command takes it.
      title: as tables show it.
      task: the harness's name of a task, a group of tasks or a tag.
      shots: examples before each question; what the task itself says by default.
      metric: "name,filter" of the figure; the task's first by default.
      new_tokens: most of an answer; what the task says by default.
      runs_code: whether the model's answers are run as programs.
      ar, twotower: published figures, in percent.
    """

    name: str
    title: str
    task: str
    shots: int | None = None
    metric: str | None = None
    new_tokens: int | None = None
    runs_code: bool = False
    ar: float | None = None
    twotower: float | None = None


BENCHMARKS = {
    name: Benchmark(name, **fields) for name, fields in tomllib.loads((HERE / "benchmarks.toml").read_text()).items()
}


def find(names: Sequence[str], include: Path | None = None) -> tuple[list[Benchmark], TaskManager]:
    """Benchmarks by name, other tasks by the harness's, and what loads them.

    Args:
      names: of benchmarks, or of tasks, groups and tags.
      include: a folder of tasks in the harness's format, which go before its own.

    Raises:
      InputError: there is no such task.
    """
    found = [BENCHMARKS.get(name) or Benchmark(name, name, name) for name in names]
    if include is None:
        own = None
    else:
        own = TaskManager(include_path=str(include), include_defaults=False)
        if all(benchmark.task in own.all_tasks for benchmark in found):
            return found, own  # the harness's thousands of tasks need not be read
    manager = TaskManager(include_path=[str(TASKS), *([str(include)] if own else [])])
    for benchmark in found:
        if benchmark.task not in manager.all_tasks:
            raise InputError(
                f"{benchmark.name} is no task; give {', '.join(BENCHMARKS)}, a task of lm-evaluation-harness, or "
                "--include FOLDER with tasks of your own"
            )
    return found, manager

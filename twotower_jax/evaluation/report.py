"""Tasks run in each mode, and the table of what came of it beside the published figures."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

import lm_eval
from datasets.exceptions import DatasetsError
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer

import twotower_jax as tt
from twotower_jax import distributed
from twotower_jax.errors import InputError
from twotower_jax.evaluation.benchmarks import Benchmark
from twotower_jax.evaluation.harness import TwoTowerLM

SHARES = ("acc", "acc_norm", "exact_match", "math_verify", "pass@1", "pass_at_1")  # metrics shown in percent
RUNS_CODE = "runs programs that the model writes; give --run-code to allow it, on a machine where they can do no harm"


@dataclasses.dataclass
class Measured:
    """A benchmark in one mode.

    Attributes:
      value: of the metric; in percent if it is a share.
      stderr: of the value; None if the harness gives none.
      tokens_per_forward: see `Tally`; None if nothing was written.
      errors: see `Tally`.
    """

    value: float
    stderr: float | None
    tokens_per_forward: float | None
    errors: list[str]


@dataclasses.dataclass
class Row:
    """A benchmark in all modes.

    Attributes:
      name, title: see `Benchmark`.
      task: the harness's.
      samples: questions.
      shots: examples before each; None if its tasks differ.
      metric: its name and filter.
      higher_is_better: whether it is.
      modes: what each gave.
      retained: of each mode but ar the share of ar's value, in percent; None if ar has none, or less is better.
      published: "ar", "twotower" and "retained", in percent; None if there are none.
    """

    name: str
    title: str
    task: str
    samples: int
    shots: int | None
    metric: str
    higher_is_better: bool
    modes: dict[str, Measured]
    retained: dict[str, float | None]
    published: dict[str, float] | None


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A benchmark with its tasks, whose data are here."""

    benchmark: Benchmark
    tasks: list[Task | Group]
    leaves: list[Task]


def load_tasks(benchmarks: Sequence[Benchmark], manager: TaskManager, run_code: bool = False) -> list[Loaded]:
    """Fetches all data, before anything is run.

    Args:
      benchmarks: what is asked for.
      manager: what loads them.
      run_code: whether programs that the model writes may be run.

    Raises:
      InputError: a data set cannot be had; a task runs programs, and nobody allowed it.
    """
    if run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # what the metric itself asks for
    found = []
    for benchmark in benchmarks:
        if benchmark.runs_code and not run_code:
            raise InputError(f"{benchmark.name} {RUNS_CODE}")
        try:
            loaded = manager.load([benchmark.task])
        except (OSError, ValueError, ImportError, RuntimeError, DatasetsError) as error:
            first = str(error).strip().partition("\n")[0]  # which names the data set, or the package, that is not here
            raise InputError(f"{benchmark.name}: the task {benchmark.task} cannot be loaded: {first}") from None
        leaves, groups = loaded["tasks"], loaded["groups"]
        if not run_code and any(getattr(task, "UNSAFE_CODE", False) for task in leaves.values()):
            raise InputError(f"{benchmark.name} {RUNS_CODE}")
        tasks = [groups[benchmark.task]] if benchmark.task in groups else list(leaves.values())
        found.append(Loaded(benchmark, tasks, list(leaves.values())))
    return found


def evaluate(
    model: tt.Model,
    tokenizer: Tokenizer,
    loaded: Sequence[Loaded],
    manager: TaskManager,
    *,
    modes: Sequence[str] = ("ar", "diffusion"),
    likelihood: str = "context",
    limit: int | None = None,
    run_code: bool = False,
    **options: Any,
) -> list[Row]:
    """Runs every benchmark in every mode.

    Log-likelihoods are the context tower's: a task of nothing else is run once, and has one value in all modes. With
    `likelihood="denoiser"` the mode diffusion has the denoiser's bound in their place.

    Args:
      model: what `tt.load` gives.
      tokenizer: its own.
      loaded: what is run.
      manager: what loaded it.
      modes: in which.
      likelihood: whose log-likelihoods the mode diffusion has.
      limit: questions of each task, the first ones; all by default.
      run_code: whether programs that the model writes may be run.
      **options: of `TwoTowerLM`.

    Raises:
      InputError: a mode, an option or a task cannot be.
    """
    models = {  # of which each says what is wrong with it before any is run
        mode: TwoTowerLM(
            model, tokenizer, mode=mode, likelihood=likelihood if mode == "diffusion" else "context", **options
        )
        for mode in modes
    }
    rows = []
    for item in loaded:
        results: dict[str, dict] = {}
        tallies = {}
        writes = any(task.OUTPUT_TYPE == "generate_until" for task in item.leaves)
        if likelihood == "denoiser" and any(task.OUTPUT_TYPE == "loglikelihood" for task in item.leaves):
            raise InputError(f"{item.benchmark.name} asks what is greedy, which the denoiser's bound does not say")
        for mode, lm in models.items():
            same = None if writes else next((m for m in results if models[m].likelihood == lm.likelihood), None)
            if same is not None:
                results[mode], tallies[mode] = results[same], tallies[same]
                continue
            if distributed.first():
                print(f"{item.benchmark.title}: {mode if writes else f'by the {lm.likelihood} tower'}", file=sys.stderr)
            results[mode], tallies[mode] = _run(lm, item, manager, limit, run_code)
        rows += _rows(item, results, tallies)
    return rows


def _run(lm: TwoTowerLM, item: Loaded, manager: TaskManager, limit: int | None, run_code: bool) -> tuple[dict, Any]:
    """The harness's results, and what was written for them."""
    lm.tally, benchmark = type(lm.tally)(), item.benchmark
    new = {} if benchmark.new_tokens is None else {"gen_kwargs": {"max_gen_toks": benchmark.new_tokens}}
    results = lm_eval.simple_evaluate(
        lm,
        tasks=item.tasks,
        num_fewshot=benchmark.shots,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        confirm_run_unsafe_code=run_code,
        **new,
    )
    return results, lm.tally


def _rows(item: Loaded, results: dict[str, dict], tallies: dict[str, Any]) -> list[Row]:
    """One, or of a tag one for each of its tasks."""
    first = next(iter(results.values()))
    names = [task.name if isinstance(task, Group) else task.task_name for task in item.tasks]
    rows = []
    for name in names:
        benchmark = item.benchmark if len(names) == 1 else Benchmark(name, name, name)
        metric = benchmark.metric or _first_metric(first["results"][name])
        plain = metric.partition(",")[0]
        modes = {}
        for mode, found in results.items():
            value, stderr = found["results"][name][metric], found["results"][name].get(metric.replace(",", "_stderr,"))
            scale = 100 if plain in SHARES else 1
            stderr = scale * stderr if isinstance(stderr, float) else None
            tally = tallies[mode]
            modes[mode] = Measured(scale * value, stderr, tally.tokens_per_forward(mode), tally.errors)
        leaves = item.leaves if len(names) == 1 else [task for task in item.leaves if task.task_name == name]
        better = first["higher_is_better"].get(leaves[0].task_name, {}).get(plain) is not False
        ar = modes["ar"].value if "ar" in modes and better else None
        rows.append(
            Row(
                name=benchmark.name,
                title=benchmark.title,
                task=name,
                samples=sum(first["n-samples"][task.task_name]["effective"] for task in leaves),
                shots=first["n-shot"].get(leaves[0].task_name) if benchmark.shots is None else benchmark.shots,
                metric=metric,
                higher_is_better=better,
                modes=modes,
                retained={mode: 100 * m.value / ar if ar else None for mode, m in modes.items() if mode != "ar"},
                published=_published(benchmark),
            )
        )
    return rows


def _first_metric(found: dict[str, Any]) -> str:
    """The first that a task names."""
    return next(key for key in found if "," in key and "_stderr," not in key)


def _published(benchmark: Benchmark) -> dict[str, float] | None:
    if benchmark.ar is None or benchmark.twotower is None:
        return None
    retained = 100 * benchmark.twotower / benchmark.ar
    return {"ar": benchmark.ar, "twotower": benchmark.twotower, "retained": retained}


def table(rows: Sequence[Row], modes: Sequence[str]) -> str:
    """All rows as lines of text: figures in percent but those that are no shares, retained quality of ar's."""
    others = [mode for mode in modes if mode != "ar"]
    retained = [(mode, "retained" if len(others) == 1 else f"{mode} retained") for mode in others if "ar" in modes]
    head = ["benchmark", "shots", "metric", *modes, *(name for _, name in retained)]
    head += ["paper AR", "paper TwoTower", "paper retained", *(f"{mode} tokens/forward" for mode in modes)]
    lines = [head]
    for row in rows:
        published = row.published or {}
        line = [row.title, _number(row.shots, 0), row.metric.partition(",")[0]]
        line += [_number(row.modes[mode].value) for mode in modes]
        line += [_number(row.retained[mode], 1) for mode, _ in retained]
        line += [_number(published.get(name), places) for name, places in (("ar", 2), ("twotower", 2), ("retained", 1))]
        lines.append([*line, *(_number(row.modes[mode].tokens_per_forward) for mode in modes)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = (0, 2)  # columns of names
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _number(value: float | None, places: int = 2) -> str:
    return "-" if value is None else f"{value:.{places}f}"

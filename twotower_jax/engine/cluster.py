"""Files of requests over a Ray cluster: Ray Data hands pieces of them to actors, of which each has a model of its own.

What an actor had at work when it died is done again by another: only whole pieces come back.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import twotower_jax as tt
from twotower_jax import sources
from twotower_jax.engine.files import Lines, Results, inputs_below, opened
from twotower_jax.engine.job import GRACE, STOPPED, Job, Options, Summary, of_shard, survey
from twotower_jax.engine.lines import Reader
from twotower_jax.errors import InputError
from twotower_jax.interrupts import Stop
from twotower_jax.placement import Placement, shared
from twotower_jax.tokenizer import load_tokenizer

PIECE = 256  # lines that an actor takes at a time: many more than there are slots, and few enough to do again


@dataclasses.dataclass
class _Kept:
    """Results in memory, in `Results`' place."""

    lines: list[bytes] = dataclasses.field(default_factory=list)

    def has(self, number: int, checksum: int) -> bool:
        return False

    def write(self, line: bytes) -> None:
        self.lines.append(line)


class Answers:
    """An engine, for `ray.data.Dataset.map_batches`: lines in, results out.

    Args:
      model: as for `tt.load`.
      dtype: of the model.
      options: see `Options`.
      placement: of the towers on the devices that Ray gives the actor; all of them for both by default.
    """

    def __init__(
        self, model: str, dtype: str = "bfloat16", options: Options | None = None, placement: Placement | None = None
    ):
        folder = sources.locate(model)
        self._name, self._tokenizer = model, load_tokenizer(folder)
        placement = shared(placement or Placement(), not sources.config_alone(folder)[1])
        self._model = tt.load(folder, dtype=dtype, placement=placement)
        self._options = options or Options()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        """Answers a batch of lines.

        Args:
          batch: "number", "raw" (bytes) and "checksum" of each line, as `lines.raw_lines` gives them.

        Returns:
          "result": a line for each, in any order; and "compile_seconds", which are to be added.
        """
        compiled = self._model.programs.compile_seconds
        columns = [batch[name].tolist() for name in ("number", "raw", "checksum")]
        kept = _Kept()
        lines: Lines = lambda: zip(*columns, strict=True)  # noqa: E731
        stop = Stop(GRACE, STOPPED, listens=False)
        Job(self._model, self._tokenizer, lines, kept, self._options, self._name, stop).run()
        compiled = self._model.programs.compile_seconds - compiled
        return {"result": kept.lines, "compile_seconds": [compiled, *[0.0] * (len(kept.lines) - 1)]}


def run(
    model: str,
    source: str,
    target: str,
    options: Options,
    *,
    dtype: str,
    actors: int,
    gpus: float | None,
    placement: Placement | None = None,
) -> Summary:
    """`job.run` on a Ray cluster: the one that `RAY_ADDRESS` names, one that runs on this machine, or a new one.

    Args:
      model: that every machine finds under this name.
      source: a file, or a folder of files (.jsonl, compressed or not, .parquet).
      target: a file; for a folder a folder, with a file of results for each.
      options: of every actor.
      dtype: of the model.
      actors: how many engines there are.
      gpus: of each; 1 by default where the cluster has GPUs.
      placement: of the towers on an actor's devices.

    Raises:
      InputError: see `job.run`; ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise InputError('--ray needs Ray: pip install "twotower_jax[ray]"') from None
    folder = sources.locate(model)
    config, backbone = sources.config_alone(folder)
    eos = config.eos_token_ids if options.eos is None else options.eos
    reader = Reader(
        load_tokenizer(folder),
        config.vocab_size,
        not backbone,
        eos,
        options.defaults,
        lambda block: options.positions,
        f"{sources.identity(sources.open_folder(folder))} {dtype}",
    )
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    if gpus is None:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
    summary, start, compiled = Summary(), time.perf_counter(), []
    made = {
        "model": model,
        "dtype": dtype,
        "options": dataclasses.replace(options, shard=(0, 1)),
        "placement": placement,
    }
    actor = {"compute": ray.data.ActorPoolStrategy(size=actors), "num_gpus": gpus}
    with Stop(GRACE, STOPPED) as stop:
        for file, out in _files(source, target):
            with opened(file) as lines, Results(out) as results:
                left = survey(of_shard(lines(), options.shard), reader, results, summary, stop)
                items = [{"number": line.number, "raw": raw, "checksum": checksum} for line, raw, checksum in left]
                if items and not stop.asked:
                    data = ray.data.from_items(items, override_num_blocks=-(-len(items) // PIECE))
                    answered = data.map_batches(Answers, fn_constructor_kwargs=made, batch_size=PIECE, **actor)
                    for line in _lines(answered, stop, compiled):
                        results.write(line)
                        _count(summary, json.loads(line))
    summary.compile_seconds = sum(compiled) / actors  # which compile at the same time
    summary.seconds = time.perf_counter() - start - summary.compile_seconds
    summary.interrupted = stop.asked
    summary.finish([])
    return summary


def _count(summary: Summary, answer: dict[str, Any]) -> None:
    """Adds a result to the summary."""
    if answer["error"] is not None:
        summary.errors += 1
        return
    usage = answer["response"]["body"]["usage"]
    summary.results += 1
    summary.prompt_tokens += usage["prompt_tokens"]
    summary.tokens += usage["completion_tokens"]
    summary.denoiser_forwards += usage["denoiser_forwards"]
    summary.context_forwards += usage["context_forwards"]
    summary.forwards += usage["forwards"]


def _lines(answered: Any, stop: Stop, compiled: list[float]) -> Iterator[bytes]:
    """Results; the seconds of compilation go to a list."""
    for batch in answered.iter_batches(batch_size=None):
        compiled += batch["compile_seconds"].tolist()
        yield from batch["result"].tolist()
        if stop.asked:  # pieces that are not whole are done again
            return


def _files(source: str, target: str) -> list[tuple[str, str]]:
    """Each file of requests, and where its results go."""
    if not Path(source).is_dir():
        return [(source, target)]
    out = Path(target)
    if out.exists() and not out.is_dir():
        raise InputError(f"{target} is a file; results of a folder go to a folder")
    found = inputs_below(Path(source))
    if not found:
        raise InputError(f"{source} holds no .jsonl or .parquet file")
    for _, name in found:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
    return [(str(file), str(out / f"{name}.results.jsonl")) for file, name in found]

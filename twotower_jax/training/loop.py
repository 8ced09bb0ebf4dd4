"""A run: steps, metrics, checkpoints; it stops when told to and goes on where it stopped, bit for bit."""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from twotower_jax import interrupts
from twotower_jax.checkpoint import TrainingCheckpoints
from twotower_jax.errors import InputError
from twotower_jax.programs import keep_between_runs
from twotower_jax.training.config import TrainingConfig
from twotower_jax.training.data import Packer
from twotower_jax.training.metrics import Metrics
from twotower_jax.training.optimizer import schedule
from twotower_jax.training.output import claimed
from twotower_jax.training.sharding import any_process, whole_position
from twotower_jax.training.start import Start
from twotower_jax.training.state import begin, describe
from twotower_jax.training.step import make_update


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a run ended: updates done, the last loss, and whether all is done."""

    step: int
    loss: float | None
    finished: bool


def run(c: TrainingConfig, start: Start) -> Ended:
    """Trains from the newest checkpoint of `c.output`, or from `start`, to the end or until a signal asks to stop.

    Every process of a job calls this alike.

    Raises:
      InputError: the folder holds another run; the data is not what it should be.
    """
    keep_between_runs()
    with claimed(Path(c.output), start.folder):
        return _run(c, start)


def _run(c: TrainingConfig, start: Start) -> Ended:
    output = Path(c.output)
    first, alone = jax.process_index() == 0, jax.process_count() == 1
    checkpoints = TrainingCheckpoints(output / "checkpoints", c.keep)
    now = begin(c, start, checkpoints)
    metrics = Metrics(output, now.step) if first else None
    rate = schedule(c)
    loss, stage, packer, update, values = None, None, None, None, None
    saved = now.step

    def save() -> None:
        nonlocal saved
        if now.step != saved:
            _require_finite(c, float(values["loss"]), now.step)
            saved = now.step
            jax.block_until_ready(now.trained)
            position = whole_position(packer.position, start.placement.local_rows)
            extra = {"config": describe(c, start), "position": position.tolist()}
            checkpoints.save(now.step, (now.trained, now.optimizer), extra)

    try:
        with (
            _told_to_stop() as told,
            tqdm(total=c.steps, initial=now.step, unit="step", disable=None if first else True) as bar,
        ):
            began, tokens, stop = time.perf_counter(), 0, False
            while now.step < c.steps and not stop:
                if c.stage_at(now.step) is not stage:
                    stage = c.stage_at(now.step)
                    size = 1 if c.objective == "ar" else stage.block_size
                    position = now.position if packer is None else packer.position
                    packer = _packer(c, start, size, position)
                    update = jax.jit(make_update(start.config, c, start.dtypes, size), donate_argnums=(0, 1))
                try:
                    rows = next(packer)
                except InputError:  # a line of the data that is none: what was trained until here stays
                    if alone:
                        save()
                    raise
                batch = start.placement.rows(rows)
                now.trained, now.optimizer, values = update(
                    now.trained, now.optimizer, start.frozen, batch, np.uint32(now.step)
                )
                now.step, tokens = now.step + 1, tokens + int((rows.segments > 0).sum())
                bar.update()
                if now.step % c.log_every == 0 or now.step == c.steps:
                    jax.block_until_ready(now.trained)  # before the processes talk of other things
                    stop = any_process(bool(told))
                    values = {name: float(value) for name, value in values.items()}
                    loss, seconds = values["loss"], time.perf_counter() - began
                    _require_finite(c, loss, now.step)
                    speed = tokens * jax.process_count() / seconds
                    values |= {"learning_rate": float(rate(now.step - 1)), "tokens_per_second": speed}
                    values |= {"epochs": packer.epochs}
                    if metrics is not None:
                        metrics.write(now.step, values)
                    bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} tokens/s")
                    began, tokens = time.perf_counter(), 0
                elif alone:
                    stop = bool(told)
                if now.step % c.save_every == 0 or now.step == c.steps or stop:
                    save()
    finally:
        checkpoints.close()
        if metrics is not None:
            metrics.close()
    finished = now.step == c.steps
    if finished:
        start.export(now.trained, output / "model")
    return Ended(now.step, loss, finished)


def _packer(c: TrainingConfig, start: Start, size: int, position: np.ndarray) -> Packer:
    """The rows that this process reads of a stage with blocks of `size` (1 in AR training)."""
    blocks = c.data.blocks if c.data.blocks and size > 1 else c.data.length // size
    rows, length = c.data.rows, c.data.length
    only = start.placement.local_rows
    return Packer(start.documents, rows, length, blocks, size, c.seed, start.eos, position, only)


@contextlib.contextmanager
def _told_to_stop() -> Iterator[list[int]]:
    """A list that gets the signals that ask the run to end; a second one ends it at once."""
    arrived: list[int] = []

    def note(number, frame):
        if arrived:
            signal.default_int_handler(number, frame)
        arrived.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return
    before = {number: signal.signal(number, note) for number in interrupts.ENDING}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _require_finite(c: TrainingConfig, loss: float, step: int) -> None:
    if not np.isfinite(loss):
        raise InputError(
            f"the loss is {loss} at step {step}; remove {c.output} and start again with a smaller learning_rate"
        )

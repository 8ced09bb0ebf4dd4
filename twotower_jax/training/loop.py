"""A run: steps, metrics, checkpoints; it stops when told to and goes on where it stopped, bit for bit."""

import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from twotower_jax import interrupts
from twotower_jax.checkpoint import TrainingCheckpoints
from twotower_jax.config import Config
from twotower_jax.errors import InputError
from twotower_jax.publishing import absent
from twotower_jax.training import objective
from twotower_jax.training.config import TrainingConfig
from twotower_jax.training.data import Batch, Packer, beginning
from twotower_jax.training.optimizer import balance_experts, make_optimizer, schedule
from twotower_jax.training.sharding import any_process, whole_position
from twotower_jax.training.start import Start


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a run ended: updates done, the last loss, and whether all is done."""

    step: int
    loss: float | None
    finished: bool


def cast(params: Any, like: Any) -> Any:
    """Parameters in the dtypes of compute."""
    return jax.tree.map(lambda p, dtype: p.astype(dtype), params, like)


def make_update(config: Config, c: TrainingConfig, dtypes: Any, block_size: int):
    """One step as a pure function.

    Args:
      config: dimensions.
      c: the run.
      dtypes: of compute, for each trained parameter.
      block_size: S.

    Returns:
      (trained, optimiser's state, frozen, batch, step) -> (trained, optimiser's state, metrics), where rows of the
      batch come as (parts, rows, ...). Its noise is a function of the seed and the step.
    """
    optimizer = make_optimizer(c)

    def loss(trained, frozen, batch: Batch, key):
        trained = cast(trained, dtypes)
        if c.objective == "ar":
            total, weight, loads = objective.ar_loss(config, trained, batch, c.remat)
        else:
            context = frozen if c.objective == "denoise" else trained
            total, weight, loads = objective.denoising_loss(config, c, context, trained, batch, block_size, key)
            if c.objective == "tied":
                more, of, _ = objective.ar_loss(config, trained, batch, c.remat)
                total += more / jnp.maximum(of, 1) * weight
        return total, (weight, loads)

    def update(trained, state, frozen, batch: Batch, step):
        key = jax.random.fold_in(jax.random.key(c.seed), step)

        def part(carry, inputs):
            gradients, total, weight = carry
            batch, key = inputs
            (more, (of, loads)), new = jax.value_and_grad(loss, has_aux=True)(trained, frozen, batch, key)
            return (jax.tree.map(jnp.add, gradients, new), total + more, weight + of), loads

        zero = jnp.zeros((), jnp.float32)
        start = (jax.tree.map(jnp.zeros_like, trained), zero, zero)
        keys = jax.random.split(key, batch.tokens.shape[0])
        (gradients, total, weight), loads = jax.lax.scan(part, start, (batch, keys))
        weight = jnp.maximum(weight, 1)
        gradients = jax.tree.map(lambda g: g / weight, gradients)
        updates, state = optimizer.update(gradients, state, trained)
        trained = optax.apply_updates(trained, updates)
        loads = jax.tree.map(lambda z: z.sum(0), loads)
        if c.objective == "ar" and loads:
            trained = trained | {"tower": balance_experts(trained["tower"], loads, c.router_rate)}
        metrics = {"loss": total / weight, "gradient_norm": optax.tree.norm(gradients), "targets": weight}
        if loads:
            metrics["busiest_expert"] = jnp.stack([z.max() / jnp.maximum(z.mean(), 1e-9) for z in loads.values()]).max()
        return trained, state, metrics

    return update


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


class Metrics:
    """`metrics.jsonl` and `tensorboard/`; of a run that goes on from an earlier step, the later lines are dropped."""

    def __init__(self, folder: Path, step: int):
        self._file = folder / "metrics.jsonl"
        lines = self._file.read_text().splitlines() if self._file.is_file() else []
        kept = [line for line in lines if _step_of(line) <= step]
        self._file.write_text("".join(line + "\n" for line in kept))
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


@dataclasses.dataclass
class State:
    """What a checkpoint holds: updates done, where the data goes on, and the arrays."""

    step: int
    position: np.ndarray
    trained: Any
    optimizer: Any


def _begin(c: TrainingConfig, start: Start, checkpoints: TrainingCheckpoints, step: int | None = None) -> State:
    """A run at one of its checkpoints (by default the newest), or at its beginning if there is none.

    Raises:
      InputError: the checkpoints are another run's, or have no such step.
    """
    optimizer = make_optimizer(c)
    trained = start.trained()
    shardings = start.placement.of(jax.eval_shape(optimizer.init, trained))
    state = State(0, beginning(c.data.rows), trained, jax.jit(optimizer.init, out_shardings=shardings)(trained))
    step = checkpoints.latest if step is None else step
    if step is None:
        return state
    extra = checkpoints.extra(step)
    _require_same(_description(c), extra["config"], Path(c.output))
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
    checkpoints = TrainingCheckpoints(folder, c.keep)
    try:
        if step is not None and step not in checkpoints.steps:
            known = ", ".join(map(str, checkpoints.steps)) or "none"
            raise InputError(f"{folder} has no checkpoint of step {step}; there are {known}")
        state = _begin(c, start, checkpoints, step)
    finally:
        checkpoints.close()
    start.export(state.trained, target)
    return state.step


def run(c: TrainingConfig, start: Start) -> Ended:
    """Trains from the newest checkpoint of `c.output`, or from `start`, to the end or until a signal asks to stop.

    Every process of a job calls this alike.

    Raises:
      InputError: the folder holds another run; the data is not what it should be.
    """
    output = Path(c.output)
    first, alone = jax.process_index() == 0, jax.process_count() == 1
    output.mkdir(parents=True, exist_ok=True)
    checkpoints = TrainingCheckpoints(output / "checkpoints", c.keep)
    now = _begin(c, start, checkpoints)
    metrics = Metrics(output, now.step) if first else None
    rate = schedule(c)
    loss, stage, packer, update, values = None, None, None, None, None
    saved = now.step

    def save() -> None:
        nonlocal saved
        if now.step != saved:
            _require_finite(float(values["loss"]), now.step)
            saved = now.step
            jax.block_until_ready(now.trained)
            position = whole_position(packer.position, start.placement.local_rows)
            extra = {"config": _description(c), "position": position.tolist()}
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
                    packer = make_packer(c, start, size, position)
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
                    _require_finite(loss, now.step)
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


def make_packer(c: TrainingConfig, start: Start, size: int, position: np.ndarray) -> Packer:
    """The rows that this process reads of a stage with blocks of `size` (1 in AR training)."""
    blocks = c.data.blocks if c.data.blocks and size > 1 else c.data.length // size
    rows, length = c.data.rows, c.data.length
    only = start.placement.local_rows
    return Packer(start.documents, rows, length, blocks, size, c.seed, start.eos, position, only)


def _description(c: TrainingConfig) -> dict[str, Any]:
    """What must not change between a run and its continuation."""
    free = ("output", "model", "save_every", "keep", "log_every")
    raw = {name: value for name, value in dataclasses.asdict(c).items() if name not in free}
    return json.loads(json.dumps(raw))


def _require_finite(loss: float, step: int) -> None:
    if not np.isfinite(loss):
        raise InputError(f"the loss is {loss} at step {step}; start again with a smaller learning_rate")


def _require_same(ours: dict[str, Any], theirs: dict[str, Any], output: Path) -> None:
    for name in ours:
        if ours[name] != theirs.get(name):
            raise InputError(
                f"{output} holds a run with another {name} ({theirs.get(name)}, here {ours[name]}); "
                "continue it as it was, or give another output"
            )

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
from twotower_jax.training import objective
from twotower_jax.training.config import TrainingConfig
from twotower_jax.training.data import Batch, Packer, Position
from twotower_jax.training.optimizer import balance_experts, make_optimizer, schedule
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
      (trained, optimiser's state, frozen, batch, key) -> (trained, optimiser's state, metrics), where rows of the batch
      come as (parts, rows, ...).
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

    def update(trained, state, frozen, batch: Batch, key):
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


def run(c: TrainingConfig, start: Start) -> Ended:
    """Trains from the newest checkpoint of `c.output`, or from `start`, to the end or until a signal asks to stop.

    Raises:
      InputError: the folder holds another run; the data is not what it should be.
    """
    output = Path(c.output)
    output.mkdir(parents=True, exist_ok=True)
    placement = start.placement
    optimizer = make_optimizer(c)
    trained = start.trained()
    state = jax.jit(optimizer.init, out_shardings=placement.of(jax.eval_shape(optimizer.init, trained)))(trained)
    dtypes = start.dtypes
    checkpoints = TrainingCheckpoints(output / "checkpoints", c.keep)
    step, position = 0, Position()
    description = _description(c)
    if (latest := checkpoints.latest) is not None:
        extra = checkpoints.extra(latest)
        _require_same(description, extra["config"], output)
        trained, state = checkpoints.load(latest, (trained, state))
        step, position = latest, Position(**extra["position"])
    metrics = Metrics(output, step)
    rate = schedule(c)
    key = jax.random.key(c.seed)
    loss, stage, packer, update, values = None, None, None, None, None
    saved = step

    def save() -> None:
        nonlocal saved
        if step != saved:
            _require_finite(float(values["loss"]), step)
            saved = step
            extra = {"config": description, "position": dataclasses.asdict(position)}
            checkpoints.save(step, (trained, state), extra)

    try:
        with (
            _told_to_stop() as stop,
            tqdm(total=c.steps, initial=step, unit="step", disable=None) as bar,
        ):
            began, since = time.perf_counter(), 0
            while step < c.steps and not stop:
                if c.stage_at(step) is not stage:
                    stage = c.stage_at(step)
                    size = 1 if c.objective == "ar" else stage.block_size
                    blocks = c.data.blocks if c.data.blocks and size > 1 else c.data.length // size
                    packer = Packer(
                        start.documents, c.data.rows, c.data.length, blocks, size, c.seed, start.eos, position
                    )
                    update = jax.jit(make_update(start.config, c, dtypes, size), donate_argnums=(0, 1))
                try:
                    rows = next(packer)
                except InputError:  # a line of the data that is none: what was trained until here stays
                    save()
                    raise
                batch = placement.rows(_parts(rows, c.accumulate))
                trained, state, values = update(trained, state, start.frozen, batch, jax.random.fold_in(key, step))
                step, position, since = step + 1, packer.position, since + 1
                bar.update()
                if step % c.log_every == 0 or step == c.steps:
                    values = {name: float(value) for name, value in values.items()}
                    loss, seconds = values["loss"], time.perf_counter() - began
                    _require_finite(loss, step)
                    speed = since * c.data.rows * c.data.length / seconds
                    values |= {"learning_rate": float(rate(step - 1)), "positions_per_second": speed}
                    values |= {"epoch": position.epoch}
                    metrics.write(step, values)
                    bar.set_postfix_str(f"loss {loss:.4f}, {speed:,.0f} positions/s")
                    began, since = time.perf_counter(), 0
                if step % c.save_every == 0 or step == c.steps or stop:
                    save()
    finally:
        checkpoints.close()
        metrics.close()
    finished = step == c.steps
    if finished:
        start.export(trained, output / "model")
    return Ended(step, loss, finished)


def _parts(batch: Batch, parts: int) -> Batch:
    return jax.tree.map(lambda z: z.reshape(parts, -1, *z.shape[1:]), batch)


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

"""What a training run is, read from a TOML file and checked."""

import dataclasses
import glob
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args

from twotower_jax.errors import InputError
from twotower_jax.sources import user_path

Objective = Literal["ar", "denoise", "tied"]
Times = Literal["uniform", "stratified"]


@dataclasses.dataclass(frozen=True)
class Data:
    """What is read.

    Attributes:
      files: patterns of files, relative to the configuration's: .jsonl with {"text"} or {"prompt", "completion"} a
        line, or text, in which an empty line ends a document.
      length: positions a row.
      rows: rows a step, over all processes.
      blocks: most blocks of a row that are denoised; 0 is all of them.
      tokenizer: a tokenizer.json, or the model's by default; "bytes" makes a byte the id `byte + 4`.
    """

    files: tuple[str, ...]
    length: int
    rows: int
    blocks: int = 0
    tokenizer: str = ""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the run with its own block size and schedule: warmup, a constant rate, decay.

    Attributes:
      steps: updates.
      block_size: S; documents are cut into blocks from their (or their completion's) start. Not used in AR training.
      learning_rate: the highest.
      final_learning_rate: the last.
      warmup: steps from 0 to the highest.
      decay: steps from the highest to the last.
    """

    steps: int
    block_size: int = 16
    learning_rate: float = 1e-4
    final_learning_rate: float = 1e-6
    warmup: int = 0
    decay: int = 0


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """A run.

    Attributes:
      output: the folder that the run makes: `checkpoints/`, `metrics.jsonl`, `tensorboard/`, and at the end `model/`.
      model: where it starts: a backbone or a TwoTower; or a `config.json` alone, for a fresh backbone.
      data: what is read.
      stages: one after the other.
      objective: `ar` trains a backbone; `denoise` a denoiser for it (NVIDIA's recipe); `tied` one tower in both roles.
      ar_weight: of next-token prediction by the denoiser, beside its own objective.
      elbo_weight: weigh a block's loss by 1 / t.
      times: how t is drawn for the blocks of a step.
      mask_token_id: the id of [MASK].
      dtype: of compute, and of the frozen tower; what is trained is kept in float32.
      weight_decay: of matrices.
      clip: largest norm of a gradient.
      beta1, beta2: AdamW's.
      router_rate: in AR training, how far a step moves an expert's correction against its load.
      accumulate: parts that a step's rows are computed in, one after the other.
      remat: compute activations again instead of keeping them.
      seed: of initial values, order of documents, noise.
      save_every: steps between checkpoints.
      keep: checkpoints kept.
      log_every: steps between lines of metrics.
    """

    output: str
    model: str
    data: Data
    stages: tuple[Stage, ...]
    objective: Objective = "denoise"
    ar_weight: float = 0.0
    elbo_weight: bool = False
    times: Times = "uniform"
    mask_token_id: int = 3
    dtype: str = "bfloat16"
    weight_decay: float = 0.1
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    router_rate: float = 1e-3
    accumulate: int = 1
    remat: bool = False
    seed: int = 0
    save_every: int = 1000
    keep: int = 2
    log_every: int = 10

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage that an update belongs to, counted from 0."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise ValueError(f"the run ends before step {step}")


def read_training_config(path: Path) -> TrainingConfig:
    """A checked run from a TOML file; its relative paths are made absolute.

    Raises:
      InputError: the file cannot be read, or says something that no run can be.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {path}: it is not UTF-8: {error.reason} at byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not TOML: {error}") from None
    home = path.absolute().parent
    try:
        config = _build(TrainingConfig, raw, "")
        _check(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    files = tuple(str(Path(glob.escape(str(home))) / file) for file in config.data.files)
    data = dataclasses.replace(config.data, files=files)
    if data.tokenizer not in ("", "bytes"):
        data = dataclasses.replace(data, tokenizer=str(home / data.tokenizer))
    model = str(home / config.model) if (home / config.model).exists() else config.model
    return dataclasses.replace(config, data=data, model=model, output=str(user_path(home / config.output)))


def _build(kind: type, raw: Any, where: str) -> Any:
    """A dataclass from a table, with every value of the type that its field asks for."""
    if not isinstance(raw, dict):
        raise InputError(f"{where.removesuffix('.')} must be a table, not {raw!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(raw.keys() - fields):
        raise InputError(f"{where}{unknown[0]} is no setting; known are {', '.join(fields)}")
    values = {}
    for name, field in fields.items():
        if name in raw:
            values[name] = _value(field.type, raw[name], where + name)
        elif field.default is dataclasses.MISSING:
            raise InputError(f"{where}{name} is missing")
    return kind(**values)


def _value(kind: Any, value: Any, where: str) -> Any:
    def need(holds: bool, what: str) -> None:
        if not holds:
            raise InputError(f"{where} must be {what}, not {value!r}")

    if kind is Data:
        return _build(Data, value, f"{where}.")
    if kind == tuple[Stage, ...]:
        need(isinstance(value, list) and bool(value), "one table or more ([[stages]])")
        return tuple(_build(Stage, stage, f"{where}[{i}].") for i, stage in enumerate(value))
    if kind == tuple[str, ...]:
        texts = isinstance(value, list) and bool(value) and all(isinstance(v, str) and v for v in value)
        need(texts, "a list of texts, one or more")
        return tuple(value)
    if get_args(kind):
        need(value in get_args(kind), " or ".join(get_args(kind)))
    elif kind is bool or kind is str:
        need(isinstance(value, kind), "true or false" if kind is bool else "a text")
    else:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        need(number and 0 <= value < 2**53, "a number of 0 or more, and below 2^53")  # not a NaN either
        need(kind is float or isinstance(value, int), "a whole number")
        value = kind(value)
    return value


def _check(c: TrainingConfig) -> None:
    """The relations between settings."""

    def need(holds: bool, message: str) -> None:
        if not holds:
            raise InputError(message)

    for name in ("length", "rows"):
        need(getattr(c.data, name) >= 1, f"data.{name} must be 1 or more")
    need(c.data.rows * c.data.length < 2**31, "data.rows times data.length must be below 2^31")
    need(c.steps < 2**31, "the stages' steps must be below 2^31 together")
    need(c.objective != "ar" or c.data.length > 1, "data.length must be 2 or more, to have a next token")
    need(c.objective != "ar" or not (c.ar_weight or c.elbo_weight), "objective ar has no ar_weight or elbo_weight")
    for name in ("accumulate", "save_every", "keep", "log_every"):
        need(getattr(c, name) >= 1, f"{name} must be 1 or more")
    need(c.clip > 0, "clip must be above 0")
    need(c.beta1 < 1 and c.beta2 < 1, "beta1 and beta2 must be below 1")
    need(c.dtype in ("float32", "bfloat16"), f"dtype must be float32 or bfloat16, not {c.dtype!r}")
    need(c.data.rows % c.accumulate == 0, f"accumulate {c.accumulate} does not divide data.rows {c.data.rows}")
    need(c.seed < 2**32, "seed must be below 2^32")
    for i, stage in enumerate(c.stages):
        need(stage.steps >= 1 and stage.block_size >= 1, f"stages[{i}] must have steps and block_size of 1 or more")
        need(stage.warmup + stage.decay <= stage.steps, f"stages[{i}]: warmup and decay are more than its steps")
        size = stage.block_size
        need(
            c.objective == "ar" or c.data.length % size == 0,
            f"stages[{i}].block_size {size} does not divide data.length {c.data.length}",
        )
        need(
            c.data.blocks * size <= c.data.length,
            f"data.blocks {c.data.blocks} of stages[{i}].block_size {size} are more than data.length {c.data.length}",
        )

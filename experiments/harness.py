"""What the experiments share: data and backbone, variants of the denoiser trained alike, results beside the scripts.

Runs and data go to `experiments/runs`, which git ignores; a run that is there and whole is not made again.
"""

import argparse
import dataclasses
import datetime
import json
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
from safetensors.numpy import load_file, save_file

import twotower_jax as tt
from experiments.demo import tasks
from twotower_jax import sources
from twotower_jax.training.config import TrainingConfig, read_training_config
from twotower_jax.training.loop import run
from twotower_jax.training.start import Start

HOME = Path(__file__).parent
RUNS = HOME / "runs"
RESULTS = HOME / "results"


def make_data() -> None:
    """Training and held-out examples, the same on every machine; what `write` writes last says that all is there."""
    if not (RUNS / "tokenizer.json").is_file():
        tasks.write(RUNS)


def make_backbone() -> None:
    """The shipped model's context tower by itself, where `denoiser.toml` looks for a backbone."""
    target = RUNS / "backbone"
    if target.is_dir():
        return
    shipped = sources.locate("demo")
    tensors = {}
    for file in shipped.glob("*.safetensors"):
        tensors |= load_file(file)
    names = {"context_tower.": "backbone.", "context_lm_head.": "lm_head."}
    target.mkdir(parents=True)
    found = {
        new + name.removeprefix(old): tensor
        for name, tensor in tensors.items()
        for old, new in names.items()
        if name.startswith(old)
    }
    save_file(found, target / "model.safetensors")
    config = json.loads((shipped / "config.json").read_text()) | {"architectures": ["NemotronHForCausalLM"]}
    (target / "config.json").write_text(json.dumps(config))
    shutil.copyfile(shipped / "tokenizer.json", target / "tokenizer.json")


def examples(count: int | None = None) -> list[dict]:
    """Held-out examples, {"prompt", "completion", "task"}."""
    make_data()
    return tasks.read(RUNS / "test.jsonl")[:count]


def variant(name: str, steps: int, block_size: int = 16, **changes) -> TrainingConfig:
    """The shipped denoiser's run, shortened, with changes; the same rows and positions a step for every variant."""
    c = read_training_config(HOME / "demo" / "denoiser.toml")
    (stage,) = c.stages
    stage = dataclasses.replace(stage, steps=steps, block_size=block_size, decay=steps * 2 // 5)
    data = dataclasses.replace(c.data, blocks=c.data.blocks * 16 // block_size)
    output = str(RUNS / f"{name}-{steps}")
    return dataclasses.replace(c, output=output, data=data, stages=(stage,), save_every=250, keep=1, **changes)


def trained(c: TrainingConfig) -> tt.Model:
    """The model that a run gives, in float32."""
    make_data()
    make_backbone()
    model = Path(c.output) / "model"
    if not model.is_dir():
        print(f"training {c.output}", flush=True)
        if not run(c, Start(c)).finished:
            sys.exit("stopped; the same command goes on")
    return tt.load(model, dtype="float32")


def parser(about: str, trains: bool = False) -> argparse.ArgumentParser:
    """With what every experiment takes, and every one that trains variants."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rows", type=_count, help="the first rows of the held-out prompts alone")
    if trains:
        made.add_argument("--steps", type=_count, default=600, help="of training, for each variant")
    return made


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, not {text}")
    return int(text)


def command(main: Callable[[], None]) -> None:
    """A script's `main`, with bad input told in one line."""
    try:
        main()
    except tt.InputError as error:
        sys.exit(str(error))


def about() -> dict[str, str]:
    """Where and how a result was made."""
    program = sys.modules["__main__"].__spec__.name
    return {
        "command": " ".join(["python -m", program, *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "jax": version("jax"),
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
    }


def save(name: str, results: dict, draw: Callable) -> None:
    """`results/NAME.json`, with where and how it was made, and `results/NAME.png`, drawn by `draw(axes, results)`."""
    import matplotlib.pyplot as plt

    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(about() | results, indent=1) + "\n")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    draw(axes, results)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(RESULTS / f"{name}.png", dpi=130)
    print(f"written: {RESULTS / name}.json, .png")


def bars(axes, modes: list[str], models: dict[str, dict]) -> None:
    """Exact match by mode, a bar for each model that has been evaluated in it."""
    for offset, (name, found) in enumerate(models.items()):
        has = [mode for mode in modes if mode in found]
        at = [modes.index(mode) + 0.27 * (offset - 1) for mode in has]
        axes.bar(at, [100 * found[mode]["exact_match"] for mode in has], width=0.25, label=name)
    labels = ["AR" if mode == "ar" else f"$\\gamma$ = {mode[1:].removesuffix('_T16')}" for mode in modes]
    axes.set_xticks(range(len(modes)), labels)
    axes.set(ylim=(0, 115), yticks=range(0, 101, 20), ylabel="exact match, %")
    axes.legend(loc="upper center", ncols=len(models))

"""What more training buys: the denoiser's checkpoints, from first to last, beside the backbone's AR.

    python -m experiments.retention

Reads the runs that `experiments/demo/train.sh` makes. Tokens are masked positions that were learned from. The points
before each run's end are taken at a high learning rate; its decay is what lifts the last ones.
"""

import json
from pathlib import Path

import twotower_jax as tt
from experiments import harness
from experiments.evaluate import evaluate, line
from twotower_jax.training.config import read_training_config
from twotower_jax.training.start import Start
from twotower_jax.training.state import export

RUNS = ["denoiser", "refine", "refine-more"]
MODES = ["g0.95_T16", "g0.8_T16"]


def targets(output: str) -> dict[int, float]:
    """Tokens learned from until each logged step; a line of metrics stands for the steps since the one before."""
    total, before, found = 0.0, 0, {}
    for text in (Path(output) / "metrics.jsonl").read_text().splitlines():
        values = json.loads(text)
        total += values["targets"] * (values["step"] - before)
        before = values["step"]
        found[before] = total
    return found


def draw(axes, results):
    axes.axhline(100, color="black", linewidth=1, label="AR")
    x = [point["tokens"] / 1e6 for point in results["points"]]
    for mode, marker in zip(MODES, "so", strict=True):
        kept = [100 * point[mode]["exact_match"] / results["ar"]["exact_match"] for point in results["points"]]
        axes.plot(x, kept, marker=marker, markersize=4, label=f"$\\gamma$ = {mode[1:-4]}")
    for end in results["ends"]:
        axes.axvline(end / 1e6, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="masked tokens learned from, millions", ylabel="kept of AR's exact match, %")
    axes.set_title("Retention over training (dotted: a run's end)")
    axes.legend()


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("--every", type=int, default=500, help="steps between points")
    args = parser.parse_args()
    examples = harness.examples(args.rows)
    results = {"rows": len(examples), "points": [], "ends": []}
    before = 0.0
    for run in RUNS:
        c = read_training_config(harness.HOME / "demo" / f"{run}.toml")
        start, tokens = Start(c), targets(c.output)
        for step in range(args.every, c.steps + 1, args.every):
            folder = harness.RUNS / "retention" / f"{run}-{step}"
            if not folder.is_dir():
                export(c, start, folder, step)
            model = tt.load(folder, dtype="float32")
            if "ar" not in results:
                results["ar"] = evaluate(model, examples, "ar")
            point = {"run": run, "step": step, "tokens": before + tokens[step]}
            results["points"].append(point | {mode: evaluate(model, examples, mode) for mode in MODES})
            for mode in MODES:
                print(line(f"{run} {step}, {mode}", results["points"][-1][mode]), flush=True)
        before += tokens[c.steps]
        results["ends"].append(before)
    harness.save("retention", results, draw)


if __name__ == "__main__":
    harness.command(main)

"""The objective's details: blocks weighed by 1 / t or not, t drawn for each block alone or stratified over a step.

python -m experiments.noise [--steps 600]
"""

import json
from pathlib import Path

from experiments import harness
from experiments.evaluate import evaluate, line

VARIANTS = {
    "stratified": ("base", {}),
    "uniform": ("uniform", {"times": "uniform"}),
    "stratified, 1/t": ("weighted", {"elbo_weight": True}),
}
MODES = ["g0.95_T16", "g0.8_T16", "g0.5_T16"]


def draw(axes, results):
    harness.bars(axes, MODES, results["variants"])
    axes.set_title("The weight of a block, and how t is drawn")


def gradient_norms(output: str) -> dict[str, float]:
    """The median and the 99th percentile of a run's gradient norms, after the first tenth."""
    lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    norms = sorted(json.loads(line)["gradient_norm"] for line in lines[len(lines) // 10 :])
    return {"median": norms[len(norms) // 2], "p99": norms[int(len(norms) * 0.99)]}


def main():
    args = harness.parser(__doc__, trains=True).parse_args()
    examples = harness.examples(args.rows)
    results = {"rows": len(examples), "steps": args.steps, "variants": {}}
    for name, (label, changes) in VARIANTS.items():
        c = harness.variant(label, args.steps, **changes)
        model = harness.trained(c)
        found = {mode: evaluate(model, examples, mode) for mode in MODES}
        results["variants"][name] = found | {"gradient_norm": gradient_norms(c.output)}
        for mode in MODES:
            print(line(f"{name}, {mode}", found[mode]), flush=True)
    harness.save("noise", results, draw)


if __name__ == "__main__":
    harness.command(main)

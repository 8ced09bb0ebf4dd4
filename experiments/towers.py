"""Separate towers against one tower in both roles, and against the same training spent on AR alone.

    python -m experiments.towers [--steps 600]

All three start from the same backbone and see as many rows. The tied tower learns both objectives at once.
"""

from experiments import harness
from experiments.evaluate import evaluate, line

MODES = ["ar", "g0.95_T16", "g0.8_T16", "g0.5_T16"]
OBJECTIVES = {"separate": "denoise", "tied": "tied", "ar continued": "ar"}


def draw(axes, results):
    harness.bars(axes, MODES, results["models"])
    axes.set_title("Two towers, one tower, or more AR training")


def main():
    args = harness.parser(__doc__, trains=True).parse_args()
    examples = harness.examples(args.rows)
    results = {"rows": len(examples), "steps": args.steps, "models": {}}
    for name, objective in OBJECTIVES.items():
        label = "base" if objective == "denoise" else objective
        model = harness.trained(harness.variant(label, args.steps, objective=objective))
        modes = MODES if model.two_towers else ["ar"]
        results["models"][name] = found = {mode: evaluate(model, examples, mode) for mode in modes}
        for mode in modes:
            print(line(f"{name}, {mode}", found[mode]), flush=True)
    harness.save("towers", results, draw)


if __name__ == "__main__":
    harness.command(main)

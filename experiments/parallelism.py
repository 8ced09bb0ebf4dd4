"""Quality against parallelism of the shipped model: thresholds and steps, with AR as the line to beat.

python -m experiments.parallelism
"""

import twotower_jax as tt
from experiments import harness
from experiments.evaluate import evaluate, line

THRESHOLDS = [0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99]
STEPS = [4, 8, 16]


def draw(axes, results):
    axes.axhline(100 * results["ar"]["exact_match"], color="black", linewidth=1, label="AR")
    for steps, marker in zip(STEPS, "s^o", strict=True):
        points = [results["diffusion"][f"g{g}_T{steps}"] for g in THRESHOLDS]
        x, y = [p["tokens_per_forward"] for p in points], [100 * p["exact_match"] for p in points]
        axes.plot(x, y, marker=marker, label=f"T = {steps}")
        for g, *at in zip(THRESHOLDS, x, y, strict=True):
            if steps == 16:
                axes.annotate(str(g), at, textcoords="offset points", xytext=(4, 5), fontsize=7)
    axes.set(xlabel="tokens per denoiser forward", ylabel="exact match, %", title="Threshold from 0.3 to 0.99")
    axes.legend()


def main():
    args = harness.parser(__doc__).parse_args()
    model, examples = tt.load("demo", dtype="float32"), harness.examples(args.rows)
    results = {"rows": len(examples), "ar": evaluate(model, examples, "ar"), "diffusion": {}}
    print(line("ar", results["ar"]))
    for steps in STEPS:
        for threshold in THRESHOLDS:
            mode = f"g{threshold}_T{steps}"
            results["diffusion"][mode] = found = evaluate(model, examples, mode)
            print(line(mode, found), flush=True)
    harness.save("parallelism", results, draw)


if __name__ == "__main__":
    harness.command(main)

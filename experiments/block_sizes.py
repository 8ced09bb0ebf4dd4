"""Block sizes: denoisers trained for 8, 16 and 32; and the shipped one, trained for 16, sampled with 4 to 64.

python -m experiments.block_sizes [--steps 600]
"""

import twotower_jax as tt
from experiments import harness
from experiments.evaluate import evaluate, line

TRAINED = [8, 16, 32]
SAMPLED = [4, 8, 16, 32, 64]
MODE = "g0.8_T{}"  # as many steps as a block has positions, so that the threshold alone decides


def draw(axes, results):
    for name, marker in ("sampled", "o"), ("trained", "s"):
        found = results[name]
        label = {"sampled": "the shipped model (16), sampled", "trained": "trained and sampled, shorter runs"}[name]
        axes.plot([int(s) for s in found], [100 * r["exact_match"] for r in found.values()], marker=marker, label=label)
        for size, r in found.items():
            text = f"{r['tokens_per_forward']:.1f}"
            at = int(size), 100 * r["exact_match"]
            axes.annotate(text, at, textcoords="offset points", xytext=(4, 5), fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(SAMPLED, SAMPLED)
    axes.set(xlabel="block size", ylabel="exact match, %", title="Block size (at the points: tokens per forward)")
    axes.legend()


def main():
    args = harness.parser(__doc__, trains=True).parse_args()
    examples = harness.examples(args.rows)
    results = {"rows": len(examples), "steps": args.steps, "trained": {}, "sampled": {}}
    for size in TRAINED:
        name = "base" if size == 16 else f"blocks-of-{size}"
        model = harness.trained(harness.variant(name, args.steps, size))
        results["trained"][size] = found = evaluate(model, examples, MODE.format(size), size)
        print(line(f"trained for {size}", found), flush=True)
    model = tt.load("demo", dtype="float32")
    for size in SAMPLED:
        results["sampled"][size] = found = evaluate(model, examples, MODE.format(size), size)
        print(line(f"sampled with {size}", found), flush=True)
    harness.save("block_sizes", results, draw)


if __name__ == "__main__":
    harness.command(main)

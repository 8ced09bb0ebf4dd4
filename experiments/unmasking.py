"""The rules of unmasking on the shipped model: exact match against tokens per forward, a curve for each.

    python -m experiments.unmasking

A curve is what a rule reaches as its number changes: the best exact match at so many tokens per forward or more. Its
area is taken over the same range for all, so that it is the mean exact match there. A rule's own number is that when
none is given.
"""

import numpy as np

import twotower_jax as tt
from experiments import harness
from experiments.evaluate import NEW_TOKENS, TOKENIZER
from experiments.verified import decode
from twotower_jax.decoding.unmasking import NAMES, RULES

SWEEPS = {
    "threshold": [0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99],
    "factor": [0.05, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0],
    "entropy": [0.01, 0.05, 0.1, 0.3, 0.6, 1.0, 2.0, 4.0],
    "margin": [0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98],
    "credit": [0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99],
    "remask": [0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99],
}


def point(model: tt.Model, examples: list[dict], rule: str) -> dict:
    """Exact match and tokens per forward."""
    prompts = [TOKENIZER.encode(example["prompt"]).ids for example in examples]
    tokens, passes = decode(model, prompts, "diffusion", unmasking=rule, max_new_tokens=NEW_TOKENS)
    right = [row == TOKENIZER.encode(e["completion"]).ids for row, e in zip(tokens, examples, strict=True)]
    return {"exact_match": float(np.mean(right)), "tokens_per_forward": sum(map(len, tokens)) / int(passes[:, 0].sum())}


def curve(points: list[dict], at: np.ndarray) -> np.ndarray:
    """The best exact match at `at` tokens per forward or more; 0 beyond the fastest point."""
    return np.array([max([p["exact_match"] for p in points if p["tokens_per_forward"] >= x], default=0) for x in at])


def draw(axes, results):
    """Every point, those of a rule joined."""
    for rule, marker in zip(NAMES, "osD^vP", strict=True):
        points = sorted(results["rules"][rule].values(), key=lambda p: p["tokens_per_forward"])
        x, y = zip(*[(p["tokens_per_forward"], 100 * p["exact_match"]) for p in points], strict=True)
        axes.plot(x, y, marker=marker, markersize=4, linewidth=1, label=f"{rule} ({100 * results['area'][rule]:.1f})")
    axes.set(xlabel="tokens per denoiser forward", ylabel="exact match, %", title="Rules of unmasking (area)")
    axes.legend(fontsize=8)


def main():
    args = harness.parser(__doc__).parse_args()
    model, examples = tt.load("demo", dtype="float32"), harness.examples(args.rows)
    results = {"rows": len(examples), "rules": {}, "area": {}}
    for rule in NAMES:
        results["rules"][rule] = found = {}
        for bound in sorted({*SWEEPS[rule], RULES[rule].bound}):
            found[str(bound)] = p = point(model, examples, f"{rule}={bound}")
            print(f"{rule}={bound:g}: {p['exact_match']:.1%}, {p['tokens_per_forward']:.2f} a forward", flush=True)
    slowest = max(min(p["tokens_per_forward"] for p in points.values()) for points in results["rules"].values())
    fastest = min(max(p["tokens_per_forward"] for p in points.values()) for points in results["rules"].values())
    at = np.linspace(slowest, fastest, 200)
    results["range"] = [slowest, fastest]
    print(f"area from {slowest:.2f} to {fastest:.2f} tokens per forward, and the rule's own number:")
    for rule, points in results["rules"].items():
        results["area"][rule] = float(curve([*points.values()], at).mean())
        own = points[str(RULES[rule].bound)]
        print(f"{rule:>10} {results['area'][rule]:.2%}   {own['exact_match']:.1%} at {own['tokens_per_forward']:.2f}")
    harness.save("unmasking", results, draw)


if __name__ == "__main__":
    harness.command(main)

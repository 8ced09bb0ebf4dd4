"""Exact match by task and mode, and tokens per forward, of a model on the held-out tasks.

    python -m experiments.evaluate MODEL [--modes ar g0.8_T16 ...] [--block-size 16] [--dtype float32] [--rows N]

A diffusion mode is g{threshold}_T{steps}. Tokens count up to a row's first EOS; forwards are the denoiser's, in ar the
context tower's; commits are the context tower's passes over finished blocks. Greedy. --out FILE.json writes the same as
JSON.
"""

import collections
import json
import re
from pathlib import Path

import twotower_jax as tt
from experiments import harness
from experiments.demo import tasks

TOKENIZER = tasks.tokenizer()
NEW_TOKENS = 64


def generate(model: tt.Model, mode: str, prompts: list[list[int]], block_size: int = 16):
    """What a mode writes: `model.Generation`."""
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": model.config.eos_token_ids}
    if mode == "ar":
        return model.generate_ar(prompts, **options)
    if mode == "mock-ar":
        return model.generate_mock_ar(prompts, **options)
    point = re.fullmatch(r"g(0?\.\d+|[01])_T(\d+)", mode)
    if point is None:
        raise tt.InputError(f"{mode} is no mode; give ar, mock-ar, or a threshold and steps such as g0.8_T16")
    threshold, steps = float(point[1]), int(point[2])
    return model.generate_mask_diffusion(
        prompts, block_size=block_size, confidence_threshold=threshold, steps_per_block=steps, **options
    )


def evaluate(model: tt.Model, examples: list[dict], mode: str, block_size: int = 16) -> dict:
    """What a mode writes, as `judged`."""
    prompts = [TOKENIZER.encode(example["prompt"]).ids for example in examples]
    return judged(generate(model, mode, prompts, block_size), examples, mode, block_size)


def judged(g, examples: list[dict], mode: str, block_size: int = 16) -> dict:
    """ "exact_match" (of all, and "by_task"), "tokens_per_forward", "tokens", "forwards" and "commits"."""
    right, total = collections.Counter(), collections.Counter()
    tokens = forwards = commits = 0
    for example, row, passes in zip(examples, g.tokens, g.forwards, strict=True):
        total[example["task"]] += 1
        right[example["task"]] += row == TOKENIZER.encode(example["completion"]).ids
        tokens, forwards = tokens + len(row), forwards + passes
        commits += -(-len(row) // block_size) - 1 if mode.startswith("g") else 0
    return {
        "exact_match": right.total() / total.total(),
        "tokens_per_forward": tokens / forwards,
        "tokens": tokens,
        "forwards": forwards,
        "commits": commits,
        "by_task": {task: right[task] / total[task] for task in sorted(total)},
    }


def line(name: str, found: dict) -> str:
    """A result in words."""
    return f"{name:>24}: {found['exact_match']:6.1%} exact, {found['tokens_per_forward']:5.2f} tokens per forward"


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--modes", nargs="+", default=["ar", "mock-ar", "g0.95_T16", "g0.8_T16", "g0.8_T4", "g0.5_T16"])
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = tt.load(args.model, dtype=args.dtype)
    results = {}
    for mode in args.modes if model.two_towers else ["ar"]:
        results[mode] = found = evaluate(model, harness.examples(args.rows), mode, args.block_size)
        print(line(mode, found))
        print(" " * 26 + ", ".join(f"{task} {share:.0%}" for task, share in found["by_task"].items()), flush=True)
    if args.out:
        args.out.write_text(json.dumps(harness.about() | {"modes": results}, indent=1) + "\n")


if __name__ == "__main__":
    harness.command(main)

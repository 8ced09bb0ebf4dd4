"""Exact match by task and mode, tokens per forward: of a model on the held-out tasks.

    python experiments/demo/evaluate.py MODEL DATA/test.jsonl [--modes ar g0.8_T16 ...] [--out FILE.json]

A diffusion mode is g{threshold}_T{steps}, with blocks of 16. Tokens count up to a row's first EOS; forwards are the
denoiser's, in ar the context tower's. Greedy, float32, in batches of 100 rows.
"""

import argparse
import collections
import json
from datetime import date
from importlib.metadata import version
from pathlib import Path

import jax

import twotower_jax as tt
from twotower_jax import sources
from twotower_jax.tokenizer import load_tokenizer

ROWS = 100
NEW_TOKENS = 64


def generate(model, mode: str, prompts: list[list[int]]):
    """What a mode writes: `model.Generation`."""
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": model.config.eos_token_ids}
    if mode == "ar":
        return model.generate_ar(prompts, **options)
    if mode == "mock-ar":
        return model.generate_mock_ar(prompts, **options)
    threshold, steps = mode.removeprefix("g").split("_T")
    return model.generate_mask_diffusion(
        prompts, confidence_threshold=float(threshold), steps_per_block=int(steps), **options
    )


def evaluate(model, tokenizer, examples: list[dict], mode: str) -> dict:
    """Shares of right answers, all and by task, and tokens per forward."""
    right, total = collections.Counter(), collections.Counter()
    tokens = forwards = 0
    for start in range(0, len(examples), ROWS):
        part = examples[start : start + ROWS]
        prompts = [tokenizer.encode(example["prompt"], add_special_tokens=False).ids for example in part]
        g = generate(model, mode, prompts)
        for example, row, passes in zip(part, g.tokens, g.forwards, strict=True):
            answer = tokenizer.encode(example["completion"], add_special_tokens=False).ids
            total[example["task"]] += 1
            right[example["task"]] += row == answer
            tokens, forwards = tokens + len(row), forwards + passes
    by_task = {task: right[task] / total[task] for task in sorted(total)}
    return {
        "exact_match": right.total() / total.total(),
        "tokens_per_forward": tokens / forwards,
        "by_task": by_task,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--modes", nargs="+", default=["ar", "g0.95_T16", "g0.8_T16", "g0.8_T4", "g0.5_T16"])
    parser.add_argument("--rows", type=int, help="the first rows of the data alone")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model = tt.load(args.model, dtype="float32")
    tokenizer = load_tokenizer(sources.locate(args.model))
    examples = [json.loads(line) for line in args.data.read_text().splitlines()][: args.rows]
    modes = [mode for mode in args.modes if mode == "ar" or model.two_towers]
    results = {}
    for mode in modes:
        results[mode] = found = evaluate(model, tokenizer, examples, mode)
        print(f"{mode:>10}: {found['exact_match']:6.1%} exact, {found['tokens_per_forward']:.2f} tokens per forward")
        print("            " + ", ".join(f"{task} {share:.0%}" for task, share in found["by_task"].items()), flush=True)
    if args.out:
        where = {"date": date.today().isoformat(), "jax": version("jax"), "device": jax.devices()[0].device_kind}
        args.out.write_text(json.dumps(where | {"rows": len(examples), "modes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

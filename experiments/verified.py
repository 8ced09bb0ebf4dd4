"""Verified decoding of the shipped model: what a draft's passes buy, where it wins, and what bfloat16 changes.

    python -m experiments.verified

Passes of both towers are added, each counted as one; AR needs one a token. The prompt's pass gives the first token, in
AR and here. All texts in float32 are AR's, or the script ends.
"""

import sys

import numpy as np

import twotower_jax as tt
from experiments import harness
from experiments.evaluate import NEW_TOKENS, TOKENIZER

ACCEPTED = [1.0, 0.5, 0.3, 0.1, 0.03, 0.01]
DRAFTS = {"1": 1, "2": 2, "3": 3, "4": 4, "adaptive": None}


def decode(model: tt.Model, prompts: list[list[int]], mode: str, **options) -> tuple[list[list[int]], np.ndarray]:
    """Each row's text, and its passes of denoiser and context tower (rows, 2)."""
    asked = {"max_new_tokens": NEW_TOKENS, "eos_token_id": model.config.eos_token_ids} | options
    tokens, passes = [[] for _ in prompts], np.zeros((len(prompts), 2), int)
    for event in model.stream(tt.Request(i, ids, mode, **asked) for i, ids in enumerate(prompts)):
        tokens[event.key] += event.tokens
        passes[event.key] = event.denoiser_forwards, event.context_forwards
    return tokens, passes


def table(model: tt.Model, examples: list[dict]) -> dict:
    """By number of draft passes: tokens per context pass, and passes of both towers per token, of all and by task."""
    prompts = [TOKENIZER.encode(example["prompt"]).ids for example in examples]
    expected, _ = decode(model, prompts, "ar")
    lengths = np.array([len(row) for row in expected])
    tasks = np.array([example["task"] for example in examples])
    found = {}
    for name, passes in DRAFTS.items():
        tokens, used = decode(model, prompts, "verified", draft_passes=passes)
        if tokens != expected:
            sys.exit(f"{sum(map(list.__ne__, tokens, expected))} texts of {name} are not AR's")
        found[name] = {
            "tokens_per_context_pass": lengths.sum() / used[:, 1].sum(),
            "passes_per_token": used.sum() / lengths.sum(),
            "denoiser_passes": int(used[:, 0].sum()),
            "context_passes": int(used[:, 1].sum()),
            "by_task": {str(t): used[tasks == t].sum() / lengths[tasks == t].sum() for t in np.unique(tasks)},
        }
        values = found[name]
        print(
            f"{name:>9}: {values['tokens_per_context_pass']:.2f} tokens per context pass, "
            f"{values['passes_per_token']:.3f} passes per token",
            flush=True,
        )
    return found


def accepting(model: tt.Model, examples: list[dict]) -> dict:
    """Exact match, and passes of both towers per token, where drafts that AR gives a probability are accepted too."""
    prompts = [TOKENIZER.encode(example["prompt"]).ids for example in examples]
    answers = [TOKENIZER.encode(example["completion"]).ids for example in examples]
    found = {}
    for probability in ACCEPTED:
        tokens, used = decode(model, prompts, "verified", accept_probability=probability)
        found[str(probability)] = values = {
            "exact_match": float(np.mean([row == answer for row, answer in zip(tokens, answers, strict=True)])),
            "passes_per_token": used.sum() / sum(map(len, tokens)),
        }
        exact, passes = values["exact_match"], values["passes_per_token"]
        print(f"accepting {probability}: {exact:.1%} exact, {passes:.3f} passes per token", flush=True)
    return found


def in_bfloat16(prompts: list[list[int]]) -> dict:
    """How many texts are AR's, and how far apart AR's logits were at the first differences."""
    model = tt.load("demo")
    expected, _ = decode(model, prompts, "ar")
    tokens, _ = decode(model, prompts, "verified")
    gaps = []
    for prompt, mine, other in zip(prompts, tokens, expected, strict=True):
        if mine != other:
            at = next(i for i, pair in enumerate(zip(mine, other, strict=False)) if pair[0] != pair[1])
            logits = model.context_logits([*prompt, *other[:at]])[-1]
            gaps.append(float(abs(logits[mine[at]] - logits[other[at]])))
    return {"equal": 1 - len(gaps) / len(prompts), "largest_gap": max(gaps, default=0.0), "gaps": gaps}


def draw(axes, results):
    """Passes per token by task, of one pass a draft and of adaptive ones."""
    tasks = sorted(results["drafts"]["1"]["by_task"], key=results["drafts"]["adaptive"]["by_task"].get)
    for offset, name in enumerate(["1", "adaptive"]):
        values = [results["drafts"][name]["by_task"][task] for task in tasks]
        label = "as many passes as pay" if name == "adaptive" else "one pass a draft"
        axes.bar(np.arange(len(tasks)) + 0.4 * (offset - 0.5), values, width=0.38, label=label)
    axes.axhline(1, color="black", linewidth=1, label="AR")
    axes.set_xticks(range(len(tasks)), tasks, rotation=30)
    axes.set(ylabel="passes of both towers per token", title="Verified decoding: the same text as AR's")
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0.93))


def main():
    args = harness.parser(__doc__).parse_args()
    examples = harness.examples(args.rows)
    model = tt.load("demo", dtype="float32")
    results = {"rows": len(examples), "drafts": table(model, examples), "accepting": accepting(model, examples)}
    results["bfloat16"] = found = in_bfloat16([TOKENIZER.encode(example["prompt"]).ids for example in examples])
    print(f"bfloat16: {found['equal']:.1%} of the texts are AR's; the largest gap {found['largest_gap']:.3f}")
    harness.save("verified", results, draw)


if __name__ == "__main__":
    harness.command(main)

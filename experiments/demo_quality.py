"""How often the shipped model is right, and how many tokens it writes a forward, by mode.

    python experiments/demo_quality.py --out experiments/demo_quality.json

120 one-line tasks (tests/data/demo_prompts.json), greedy, float32, in one batch. Tokens count up to a row's first EOS.
"The reference's" counts the rows whose tokens are those that NVIDIA's PyTorch code gives.
"""

import argparse
import json
from datetime import date
from importlib.metadata import version
from pathlib import Path

import jax

import twotower_jax as tt
from twotower_jax import sources
from twotower_jax.tokenizer import load_tokenizer

PROMPTS = Path(__file__).parent.parent / "tests" / "data" / "demo_prompts.json"
SETTINGS = [(0.95, 16), (0.8, 16), (0.8, 4), (0.5, 16)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    args = parser.parse_args()
    tasks = json.loads(PROMPTS.read_text())
    tokenizer = load_tokenizer(sources.locate("demo"))
    model = tt.load("demo", dtype="float32")
    prompts = [tokenizer.encode(task["prompt"]).ids for task in tasks]
    options = {"max_new_tokens": 32, "eos_token_id": model.config.eos_token_ids}
    runs = {"ar": model.generate_ar(prompts, **options), "mock_ar": model.generate_mock_ar(prompts, **options)}
    for gamma, steps in SETTINGS:
        runs[f"g{gamma}_T{steps}"] = model.generate_mask_diffusion(
            prompts, confidence_threshold=gamma, steps_per_block=steps, **options
        )
    table = []
    print(f"{'mode':10} {'exact match':>12} {'tokens per forward':>20} {'the reference' + chr(39) + 's':>16}")
    for mode, run in runs.items():
        right = sum(tokenizer.decode(tokens) == task["answer"] for tokens, task in zip(run.tokens, tasks, strict=True))
        same = sum(tokens == task[mode] for tokens, task in zip(run.tokens, tasks, strict=True))
        row = {
            "mode": mode,
            "exact_match": right / len(tasks),
            "tokens_per_forward": sum(map(len, run.tokens)) / sum(run.forwards),
            "as_reference": same,
        }
        print(f"{mode:10} {row['exact_match']:12.1%} {row['tokens_per_forward']:20.2f} {same:>12}/{len(tasks)}")
        table.append(row)
    if args.out:
        about = {"date": str(date.today()), "jax": version("jax"), "device": jax.devices()[0].device_kind}
        args.out.write_text(json.dumps(about | {"rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""AR beside transformers' own NemotronH, PyTorch's code of one tower: the same weights on the same machine, in turns.

    pip install ".[transformers]" && python -m experiments.peers [--rows 1 8] [--tokens 64] [--runs 5]

`mid`'s context tower in float32 with random weights; greedy, prompts of 64 tokens included. transformers has no
TwoTower: beside our diffusion stands what its forwards of 16 tokens come to, 16 for the passes over a block and one for
the commit, without prompt, time conditioning or sampling. Writes `results/peers-DEVICE.json`.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version

import jax
import numpy as np
import torch
import transformers

import twotower_jax as tt
from convert import convert
from experiments import harness
from twotower_jax import sources

PROMPT, BLOCK = 64, 16
KINDS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
GIVEN = ("model_type", "architectures", "hybrid_override_pattern", "num_hidden_layers", "transformers_version")


def peer() -> transformers.NemotronHForCausalLM:
    """`mid`'s context tower as transformers makes it, with random weights."""
    raw = json.loads((sources.CONFIGS / "mid.json").read_text())
    kinds = [KINDS[kind] for kind in raw["hybrid_override_pattern"]]
    torch.manual_seed(0)
    config = transformers.NemotronHConfig(
        layers_block_type=kinds, **{name: value for name, value in raw.items() if name not in GIVEN}
    )
    return transformers.NemotronHForCausalLM(config).float().eval()


def ours(model: transformers.NemotronHForCausalLM) -> tt.Model:
    """The same weights here, both towers copies of them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/peer")
        convert(f"{folder}/peer", f"{folder}/ours", two_towers=True)
        return tt.load(f"{folder}/ours", dtype="float32")


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compared(peer: transformers.NemotronHForCausalLM, model: tt.Model, rows: int, tokens: int, runs: int) -> dict:
    """Tokens per second of both, medians of `runs` in turns after one that is not counted."""
    prompts = np.random.default_rng(0).integers(4, model.config.vocab_size, (rows, PROMPT))
    ids, asked = torch.tensor(prompts), {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    cache = peer(ids, use_cache=True).past_key_values
    caches = iter([copy.deepcopy(cache) for _ in range(runs + 1)])
    block = torch.full((rows, BLOCK), 3)
    of_block = {"max_new_tokens": 2 * BLOCK, "confidence_threshold": 1.0}
    ways = {
        "AR, transformers": lambda: peer.generate(ids, attention_mask=torch.ones_like(ids), **asked),
        "AR": lambda: model.generate_ar(prompts.tolist(), tokens),
        "forward, transformers": lambda: peer(block, past_key_values=next(caches), use_cache=True),
        "diffusion": lambda: model.generate_mask_diffusion(prompts.tolist(), **of_block),
    }
    written = ways["AR, transformers"]()[:, PROMPT:].tolist()
    alike = np.mean(np.asarray(written) == np.asarray(ways["AR"]().tokens))
    turns = [{name: seconds(way) for name, way in ways.items()} for _ in range(runs + 1)]
    middle = {name: statistics.median(turn[name] for turn in turns[1:]) for name in ways}
    rates = {name: rows * tokens / middle[name] for name in ("AR", "AR, transformers")}
    rates["diffusion, 16 passes"] = rows * of_block["max_new_tokens"] / middle["diffusion"]
    rates["diffusion, 16 passes, of transformers' forwards"] = rows * BLOCK / (17 * middle["forward, transformers"])
    return {"tokens_per_second": rates, "same_tokens": float(alike)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    with torch.inference_mode():
        theirs = peer()
        model = ours(theirs)
        results = {rows: compared(theirs, model, rows, args.tokens, args.runs) for rows in args.rows}
    for rows, found in results.items():
        for name, rate in found["tokens_per_second"].items():
            print(f"{rows} rows: {name}: {rate:.1f} tokens/s")
        print(f"{rows} rows: {found['same_tokens']:.1%} of AR's tokens are the same")
    device = jax.devices()[0].device_kind.replace(" ", "-")
    about = {"torch": version("torch"), "transformers": version("transformers"), "cores": os.cpu_count()}
    target = harness.RESULTS / f"peers-{device}.json"
    target.write_text(json.dumps(harness.about() | about | {"by_rows": results}, indent=1) + "\n")
    print(f"written: {target}")


if __name__ == "__main__":
    harness.command(main)

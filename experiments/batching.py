"""Rows at their own pace against lock-step batches of the same rows: tokens per second, in one run.

    python -m experiments.batching [--model demo] [--rows 16] [--prompts 200] [--share 0.25 ...] [--dtype float32]

Outputs of 8 to 512 tokens, none of which ends early. A lock-step batch is the same programs with every row begun
together, every block waited for, and no slot filled again before the longest row is done. Compilation is not timed.
With --apart the towers have devices 0 and 1, which share the machine's cores where
XLA_FLAGS=--xla_force_host_platform_device_count=2. Writes `results/batching[-apart]-DEVICE.json`.
"""

import argparse
import json
import time

import jax
import numpy as np

import twotower_jax as tt
from experiments import harness
from experiments.demo import tasks
from twotower_jax.engine.request import Request
from twotower_jax.engine.scheduler import Engine


def requests(model: tt.Model, count: int) -> list[Request]:
    """The first held-out prompts; lengths drawn evenly from 8 to 512."""
    lengths = np.random.default_rng(0).integers(8, 513, count)
    prompts = [tasks.tokenizer().encode(example["prompt"]).ids for example in harness.examples(count)]
    return [
        Request(i, ids, max_new_tokens=int(n)).checked(model.config.vocab_size, True)
        for i, (ids, n) in enumerate(zip(prompts, lengths, strict=True))
    ]


def by_engine(model: tt.Model, wanted: list[Request], rows: int, share: float) -> tuple[dict, float, Engine]:
    """Tokens by key, seconds without compilation, and the engine."""
    sizes = {"slots": rows, "capacity": 1024, "block_size": 16}
    engine = Engine(model.towers, model.programs, model.params, share=share, **sizes)
    compiled, start = model.programs.compile_seconds, time.perf_counter()
    tokens: dict[int, list[int]] = {r.key: [] for r in wanted}
    for event in engine.run(wanted):
        tokens[event.key] += event.tokens
    seconds = time.perf_counter() - start
    return tokens, seconds - (model.programs.compile_seconds - compiled), engine


def in_lock_step(model: tt.Model, wanted: list[Request], rows: int) -> tuple[dict, float]:
    """Tokens by key, and seconds without compilation, of batches one after the other: in each all rows begin a block
    together, and all slots wait for the longest row.
    """
    tokens, seconds = {}, 0.0
    for start in range(0, len(wanted), rows):
        part, own, _ = by_engine(model, wanted[start : start + rows], rows, share=1.0)
        tokens, seconds = tokens | part, seconds + own
    return tokens, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--share", type=float, nargs="+", default=[0.05, 0.25, 0.5, 1.0])
    parser.add_argument("--apart", action="store_true")
    args = parser.parse_args()
    model = tt.load(args.model, dtype=args.dtype, placement=tt.Placement([0], [int(args.apart)]))
    wanted = requests(model, args.prompts)
    count = sum(r.max_new_tokens for r in wanted)
    in_lock_step(model, wanted[: args.rows], args.rows)
    alike, seconds = in_lock_step(model, wanted, args.rows)
    result = {"lock_step": {"seconds": seconds, "tokens_per_second": count / seconds}, "engine": {}}
    print(f"lock-step: {count / seconds:.0f} tokens/s", flush=True)
    for share in args.share:
        tokens, own, engine = by_engine(model, wanted, args.rows, share)
        same = sum(tokens[key] == alike[key] for key in alike)
        result["engine"][share] = {
            "seconds": own,
            "tokens_per_second": count / own,
            "against_lock_step": seconds / own,
            "slot_use": engine.use.share,
            "rows_with_the_same_tokens": same,
        }
        print(f"engine, share {share}: {result['engine'][share]}", flush=True)
    device = jax.devices()[0].device_kind.replace(" ", "-")
    about = {"model": args.model, "dtype": args.dtype, "rows": args.rows, "prompts": args.prompts, "tokens": count}
    file = harness.RESULTS / f"batching{'-apart' * args.apart}-{device}.json"
    file.write_text(json.dumps(harness.about() | about | result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What experts in 8 and 4 bits cost: exact match and tokens per forward on the held-out tasks, and bytes.

    python -m experiments.fewer_bytes [--modes ar g0.8_T16 ...] [--rows N] [--model demo]

Each form of the experts is converted from MODEL and evaluated in float32, so that nothing else differs. Beside what
`evaluate` counts stand the share of prompts whose tokens are those of full precision, the parameters' bytes in a bfloat16
model, and the root mean square of what quantising changes of the experts' weights, as a share of their own.
"""

import json
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import twotower_jax as tt
from convert import convert
from experiments import harness
from experiments.evaluate import TOKENIZER, evaluate, generate, line
from twotower_jax import sources, two_tower
from twotower_jax.config import EXPERT_BITS
from twotower_jax.layers.moe import scales_of
from twotower_jax.layers.quantized import Quantized
from twotower_jax.parameters import flatten, parameter_bytes


def changed(model: tt.Model, like: tt.Model) -> float:
    """The root mean square change of the experts' weights, as a share of that of the weights."""
    ours, theirs = dict(flatten(model.params)), dict(flatten(like.params))
    off = size = 0.0
    for path, values in ours.items():
        scales = ours.get((*path[:-1], scales_of(path[-1])))
        if scales is not None:
            whole = np.asarray(theirs[path], np.float64)
            off += np.square(np.asarray(Quantized(values, scales).dequantized(jnp.float32)) - whole).sum()
            size += np.square(whole).sum()
    return float(np.sqrt(off / size))


def model_bytes(model: tt.Model) -> int:
    """Of the parameters of a bfloat16 model."""
    return parameter_bytes(model.config, two_tower.describe(model.config, model.two_towers), jnp.dtype(jnp.bfloat16))


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--modes", nargs="+", default=["ar", "g0.95_T16", "g0.8_T16", "g0.5_T16"])
    args = parser.parse_args()
    examples = harness.examples(args.rows)
    prompts = [TOKENIZER.encode(example["prompt"]).ids for example in examples]
    full = tt.load(args.model, "float32")
    results, texts = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for form in ("full", *EXPERT_BITS):
            model = full
            if form != "full":
                model = tt.load(
                    convert(sources.locate(args.model), Path(folder) / form, experts=form).target, "float32"
                )
            results[form] = found = {"bytes": model_bytes(model), "modes": {}}
            if form != "full":
                found["weights_changed_by"] = changed(model, full)
            for mode in args.modes:
                found["modes"][mode] = measured = evaluate(model, examples, mode)
                rows = generate(model, mode, prompts).tokens
                same = [a == b for a, b in zip(rows, texts.setdefault(mode, rows), strict=True)]
                measured["same_as_full"] = sum(same) / len(same)
                print(line(f"{form} {mode}", measured), f"{measured['same_as_full']:6.1%} the same", flush=True)
    out = harness.RESULTS / "fewer_bytes.json"
    out.write_text(json.dumps(harness.about() | {"prompts": len(prompts), "experts": results}, indent=1) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    harness.command(main)

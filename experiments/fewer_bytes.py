"""What experts in 8 and 4 bits cost: exact match and tokens per forward on the held-out tasks, and bytes.

    python -m experiments.fewer_bytes [--modes ar g0.8_T16 ...] [--rows N] [--model demo]

Each form of the experts is converted from MODEL and evaluated in float32, so that nothing else differs. Beside what
`evaluate` counts stand the share of prompts whose tokens are those of full precision; the bytes of the parameters of a
bfloat16 model, and of the folder, which Orbax compresses; and the root mean square of the change of the experts'
weights, as a share of their own.
"""

import json
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import twotower_jax as tt
from convert import convert
from experiments import harness
from experiments.evaluate import TOKENIZER, generate, judged, line
from twotower_jax import two_tower
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


def size(folder: Path) -> int:
    """Of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main():
    parser = harness.parser(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--modes", nargs="+", default=["ar", "g0.8_T16", "g0.5_T16"])
    args = parser.parse_args()
    examples = harness.examples(args.rows)
    prompts = [TOKENIZER.encode(example["prompt"]).ids for example in examples]
    full, results, texts = tt.load(args.model, "float32"), {}, {}
    with tempfile.TemporaryDirectory() as home:
        for form in (None, *EXPERT_BITS):
            folder = convert(args.model, Path(home) / str(form), experts=form).target
            model = tt.load(folder, "float32")
            found = {"bytes": model_bytes(model), "checkpoint_bytes": size(folder), "modes": {}}
            results[form or "full"] = found
            if form:
                found["weights_changed_by"] = changed(model, full)
            for mode in args.modes:
                g = generate(model, mode, prompts)
                same = [a == b for a, b in zip(g.tokens, texts.setdefault(mode, g.tokens), strict=True)]
                found["modes"][mode] = judged(g, examples, mode) | {"same_as_full": sum(same) / len(same)}
                print(line(f"{form or 'full'} {mode}", found["modes"][mode]), f"{sum(same)} rows the same", flush=True)
    out = harness.RESULTS / "fewer_bytes.json"
    out.write_text(json.dumps(harness.about() | {"prompts": len(prompts), "experts": results}, indent=1) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    harness.command(main)

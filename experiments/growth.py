"""Cost as work grows: with the context's length, the prompt's, and the rows; memory as computed and as it is.

    python -m experiments.growth [--model mid] [--dtype float32] [--contexts 256 1024 ...] [--rows 1 2 4 ...]

Random weights on the first device. A context is not read for the passes over it: its caches hold zeros. A prompt is
read `PREFILL_TOKENS` at a time, as the engine does it. Writes
`results/growth-MODEL-DEVICE.json` and a picture.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from twotower_jax import two_tower
from twotower_jax.benchmark import pieces, subject
from twotower_jax.benchmark.clock import seconds
from twotower_jax.benchmark.pieces import Setting
from twotower_jax.benchmark.report import BLOCK, MASK
from twotower_jax.benchmark.rows import ReadRows
from twotower_jax.state import TowerState, empty_state, state_bytes

STEPS = ("AR step", "denoiser pass")


def passes(model: subject.Subject, rows: int, context: int) -> dict[str, float]:
    """Seconds of an AR step and of a denoiser pass of rows that have so long a context."""
    c, capacity = model.config, context + BLOCK
    empty = jax.tree.map(np.asarray, empty_state(c, 1, capacity, model.dtype))
    tokens = np.random.default_rng(0).integers(0, c.vocab_size, (rows, context + BLOCK), np.int32)
    none = np.zeros((rows, context // BLOCK + 1, c.pattern.count("E"), c.experts), bool)
    read = ReadRows(tokens, [empty] * rows, none, none, none)
    setting = Setting(c, model.dtype, rows, context, capacity, BLOCK, MASK)
    step = next(pieces.context_pieces(setting, model.params["context"]))
    one = next(pieces.denoiser_pieces(setting, model.params["denoiser"]))
    on = model.programs, model.group, model.params
    return {piece.name: pieces.timed(piece, piece.given(read), *on).seconds.median for piece in (step, one)}


def prompt(model: subject.Subject, tokens: int) -> float:
    """Seconds in which a prompt of one row is read."""
    c = model.config
    ids = jnp.asarray(np.random.default_rng(0).integers(0, c.vocab_size, (1, tokens), np.int32))
    count = jnp.full(1, tokens, jnp.int32)
    read = jax.jit(functools.partial(two_tower.prefill, c, capacity=tokens))
    params = {"context": model.params["context"]}
    return seconds(lambda: read(params, ids, count), samples=3).median


def memory(model: subject.Subject, context: int) -> dict[str, int]:
    """Bytes of a row's state: as computed, and of the arrays that there are."""
    state: TowerState = empty_state(model.config, 1, context, model.dtype)
    measured = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    return {"computed": state_bytes(model.config, 1, context, model.dtype), "measured": measured}


def draw(axes, results: dict) -> None:
    """Time per pass against the context, and per token of a prompt against its length."""
    for name in STEPS:
        points = sorted((int(n), 1e3 * found[name]) for n, found in results["by_context"].items())
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=f"{name}, 1 row")
    points = sorted((int(n), 1e3 * took / int(n)) for n, took in results["by_prompt"].items())
    axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label="a prompt's token")
    lengths = [n for n, _ in points]
    axes.set(xscale="log", xlabel="tokens of context, or of the prompt", ylabel="ms", ylim=(0, None))
    axes.set_xticks(lengths, map(str, lengths))
    axes.minorticks_off()
    axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mid")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    args = parser.parse_args()
    if any(n < BLOCK or n % BLOCK for n in args.contexts):
        parser.error(f"--contexts are multiples of {BLOCK}")
    model = subject.find(args.model, args.dtype)
    model.hold("context", "denoiser")
    results = {"model": args.model, "dtype": args.dtype, "by_context": {}, "by_prompt": {}, "memory": {}, "by_rows": {}}
    for context in args.contexts:
        results["by_context"][context] = passes(model, 1, context)
        results["by_prompt"][context] = prompt(model, context)
        results["memory"][context] = memory(model, context)
        print(context, *(results[name][context] for name in ("by_context", "by_prompt", "memory")), flush=True)
    for rows in args.rows:
        took = passes(model, rows, args.contexts[0])
        results["by_rows"][rows] = took | {"ar_tokens_per_second": rows / took["AR step"]}
        print(f"{rows} rows:", results["by_rows"][rows], flush=True)
    device = jax.devices()[0].device_kind.replace(" ", "-")
    harness.save(f"growth-{args.model}-{device}", results, draw)


if __name__ == "__main__":
    harness.command(main)

"""Measure how fast a model is here, and how near to what the device could do."""

import argparse
import json
import sys

from twotower_jax.cli.options import add_json
from twotower_jax.config import EXPERT_BITS
from twotower_jax.errors import InputError

PASSES = [5.4, 16.0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="mid, released or a config.json: random weights; or a model as for generate")
    add("--rows", type=int, nargs="+", default=[1, 8], metavar="N", help="that are written at a time (1 8)")
    add("--context", type=int, default=256, metavar="N", help="tokens that each has read (256)")
    add(
        "--max-new-tokens",
        type=int,
        default=64,
        metavar="N",
        help="that each writes, 48 or more (64)",
    )
    add("--passes", type=float, nargs="+", metavar="P", help="random: a block's passes (5.4 16)")
    add("--prompts", metavar="FILE", help="what a loaded model is asked, a line each (a shipped one has its own)")
    add("--dtype", default="bfloat16", help="bfloat16 (default) or float32")
    add("--experts", choices=EXPERT_BITS, help="random: quantised, as convert makes them")
    add("--one-tower-at-a-time", action="store_true", help="random: the pieces alone, where both towers do not fit")
    add("--out", metavar="FILE", help="write the results as JSON")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Time the pieces of decoding and the engine on the first device, for each number of rows.

    Of each piece: AR step, denoiser pass, commit, verification, prefill, head and sampler, the time, the bytes and
    operations that it needs at least, and the share of the limit that these set at the device's measured rates. Then
    tokens per second of AR, diffusion and verified decoding. Every line, and FILE, is written as soon as it is known: a
    run that is stopped leaves what it has measured.
    """
    from twotower_jax import inputs, publishing, sources
    from twotower_jax.benchmark import report, subject
    from twotower_jax.programs import keep_between_runs

    rows = list(dict.fromkeys(inputs.whole("--rows", n, 1, 2**16) for n in args.rows))
    passes = list(dict.fromkeys(inputs.number("--passes", p, 1, report.BLOCK) for p in args.passes or PASSES))
    new_tokens = inputs.whole("--max-new-tokens", args.max_new_tokens, 3 * report.BLOCK, 2**20)
    context = inputs.whole("--context", args.context, report.BLOCK, 2**20)
    for name, number in (("--context", context), ("--max-new-tokens", new_tokens)):
        if number % report.BLOCK:
            raise InputError(f"{name} must be a multiple of {report.BLOCK}, the block size, not {number}")
    out = None if args.out is None else sources.user_path(args.out)
    keep_between_runs()
    found = subject.find(args.model, args.dtype, args.prompts, args.experts)
    if args.passes and found.trained:
        raise InputError(f"--passes are for random weights; {args.model} takes as many as its answers need")
    if out is not None:  # rather now than after all the work
        try:
            there = out.exists()
            out.open("a").close()
            if not there:
                out.unlink()
        except OSError as error:
            raise InputError(f"--out {out} cannot be written: {error.strerror}") from None
    options = {"context": context, "new_tokens": new_tokens, "passes": passes, "apart": args.one_tower_at_a_time}
    lines, told = 0, sys.stderr if args.json else sys.stdout
    for result in report.measure(found, rows, **options, say=lambda line: print(line, file=sys.stderr, flush=True)):
        if out is not None:
            publishing.replace_text(out, json.dumps(result, indent=1) + "\n")
        table = report.table(result)
        print(*table[lines:], sep="\n", file=told, flush=True)
        lines = len(table)
    if args.json:
        print(json.dumps(result), flush=True)
    return 0

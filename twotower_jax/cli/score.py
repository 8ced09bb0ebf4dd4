"""Say how probable texts are."""

import argparse
import dataclasses
import json
import sys

from twotower_jax.cli.options import add_placement, asked_placement
from twotower_jax.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="FILE", help="lines of JSON, which may be compressed (.gz, .bz2, .xz); - is stdin")
    add("--model", required=True, metavar="MODEL", help="as for generate")
    add("--by", choices=("context", "denoiser"), default="context", help="exactly (default), or a lower bound")
    add("--samples", type=int, metavar="N", help="denoiser: masks of each block (16)")
    add("--block-size", type=int, metavar="S", help="denoiser: positions denoised together (16)")
    add("--mask-token-id", type=int, metavar="ID", help="denoiser: the id of [MASK] (3)")
    add("--seed", type=int, metavar="N", help="denoiser: of the masks (0)")
    add("--per-token", action="store_true", help="each token's part, too")
    add("--dtype", default="bfloat16", help="bfloat16 (default) or float32")
    add_placement(parser)
    add("--json", action="store_true", help="print the summary as JSON")


def run(args: argparse.Namespace) -> int:
    """Say of each line, {"text": ...} or {"prompt": ..., "completion": ...}, how probable its text is: all tokens after
    the first, or the completion's given the prompt.
    """
    import twotower_jax as tt
    from twotower_jax import sources
    from twotower_jax.engine import files
    from twotower_jax.placement import shared
    from twotower_jax.scoring import lines, scorer
    from twotower_jax.tokenizer import load_tokenizer
    from twotower_jax.two_tower import dtype_of

    options = {name: getattr(args, name) for name in ("samples", "block_size", "mask_token_id", "seed")}
    options = {name: value for name, value in options.items() if value is not None}
    if options and args.by == "context":
        raise InputError(f"--{next(iter(options)).replace('_', '-')} is no option of --by context")
    options |= {"by": args.by, "per_token": args.per_token}
    folder = sources.locate(args.model)
    tokenizer = load_tokenizer(folder)
    placement = shared(asked_placement(args), not sources.config_alone(folder)[1])
    summary = lines.Summary()
    with files.opened(args.source) as opened:
        model = tt.load(folder, dtype=args.dtype, placement=placement)
        model.score([], **options)  # says what is wrong with them
        longest = scorer.longest(model.towers, dtype_of(model.params))
        read = lines.Reader(tokenizer, model.config.vocab_size, longest)
        found = (read.line(number, raw) for number, raw, _ in opened())
        for answer in lines.answers(found, lambda pairs: model.score(pairs, **options), summary):
            print(json.dumps(answer))
    print(json.dumps(dataclasses.asdict(summary)) if args.json else summary, file=sys.stderr)
    return 1 if summary.errors else 0

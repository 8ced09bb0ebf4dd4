"""Answer a file of requests."""

import argparse
import dataclasses
import json
import re
import sys

from twotower_jax.cli.options import add_job, add_json, add_placement, asked_placement, stop_ids
from twotower_jax.decoding import MODES
from twotower_jax.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="IN", help="lines of JSON, which may be compressed (.gz, .bz2, .xz); - is stdin")
    add("target", metavar="OUT", help="a file of results, gone on with if it is there; - is stdout")
    add("--model", required=True, metavar="MODEL", help="as for generate")
    add("--dtype", default="bfloat16", help="bfloat16 (default) or float32")
    add("--mode", choices=MODES, default="diffusion", help="of lines that do not say (diffusion)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="of lines that do not say (128)")
    add("--eos-token-id", action="append", metavar="ID", help="id that ends a row, or none (config.json's)")
    add("--slots", type=int, metavar="N", help="rows that are written at a time (what fits and pays)")
    add("--memory", type=float, metavar="GB", help="of each device, for rows (most of what is free)")
    add("--context", type=int, metavar="N", help="prompt and new tokens of a request at most (262144)")
    add("--shard", default="0/1", metavar="I/N", help="of every N lines the one at place I, from 0")
    add("--ray", type=int, metavar="N", help="so many engines on a Ray cluster; IN and OUT may be folders")
    add("--gpus", type=float, metavar="G", help="with --ray: of each engine (1 where there are any)")
    add_placement(parser)
    add_job(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Answer every line of a file once, in OpenAI's batch format; a job that was stopped goes on where it was."""
    import twotower_jax as tt
    from twotower_jax import distributed, inputs, sources
    from twotower_jax.engine import cluster, files, job
    from twotower_jax.placement import shared
    from twotower_jax.tokenizer import load_tokenizer

    if args.json and args.target == files.STANDARD:
        raise InputError("--json prints the summary where the results go; give OUT a name")
    shard = re.fullmatch(r"(\d{1,9})/(\d{1,9})", args.shard)
    if shard is None or not int(shard[1]) < int(shard[2]):
        raise InputError(f"--shard takes I/N with I from 0 to N - 1, such as 0/4, not {args.shard!r}")
    options = job.Options(
        defaults={
            "mode": args.mode,
            "max_new_tokens": inputs.whole("--max-new-tokens", args.max_new_tokens, 0, 2**30),
        },
        eos=None if args.eos_token_id is None else stop_ids(args.eos_token_id),
        slots=None if args.slots is None else inputs.whole("--slots", args.slots, 1, 2**20),
        memory=None if args.memory is None else int(1e9 * inputs.number("--memory", args.memory, 0, 1e6)),
        positions=inputs.whole("--context", job.POSITIONS if args.context is None else args.context, 1, 2**31 - 1),
        shard=(int(shard[1]), int(shard[2])),
    )
    if args.ray is not None:
        if args.coordinator is not None:
            raise InputError("--ray and --coordinator are two ways to use many machines; give one")
        actors = inputs.whole("--ray", args.ray, 1, 2**20)
        placement = asked_placement(args)
        made = {"dtype": args.dtype, "actors": actors, "gpus": args.gpus, "placement": placement}
        summary = cluster.run(args.model, args.source, args.target, options, **made)
    else:
        distributed.join(args.coordinator, args.processes, args.process)
        with distributed.quiet():
            with distributed.checked_together() as said:
                said += [sorted((k, str(v)) for k, v in vars(args).items() if k not in ("process", "run"))]
                folder = sources.locate(args.model)
                tokenizer = load_tokenizer(folder)
                placement = shared(asked_placement(args), not sources.config_alone(folder)[1])
            model = tt.load(folder, dtype=args.dtype, placement=placement)
            if distributed.first():
                print(model.towers, file=sys.stderr)
            summary = job.run(model, tokenizer, args.source, args.target, options, args.model)
    if distributed.first():
        print(summary, file=sys.stderr)
        if args.json:
            print(json.dumps(dataclasses.asdict(summary)))
    if summary.interrupted:
        print(job.STOPPED, file=sys.stderr)
        return 130
    return 1 if summary.errors else 0

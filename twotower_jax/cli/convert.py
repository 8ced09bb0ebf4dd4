"""Convert a checkpoint."""

import argparse
import json
import time

from twotower_jax.cli.options import add_json
from twotower_jax.config import EXPERT_BITS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SRC", help="a folder (NVIDIA's layout, a backbone or a converted one) or a Hugging Face id")
    add("target", metavar="DST", help="the folder to make")
    add("--two-towers", action="store_true", help="make two towers of a backbone, ready to train")
    add("--to-hf", action="store_true", help="write NVIDIA's layout (safetensors) instead of ours (Orbax)")
    add("--experts", choices=EXPERT_BITS, help="quantise the routed experts: 8 or 4 bits a number")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Convert a checkpoint: Hugging Face's layouts to ours, or back."""
    from convert import convert

    start = time.perf_counter()
    made = convert(args.source, args.target, two_towers=args.two_towers, hf=args.to_hf, experts=args.experts)
    seconds = time.perf_counter() - start
    if args.json:
        result = {"target": str(made.target), "two_towers": made.two_towers, "parameters": made.parameters}
        result |= {"experts": args.experts}
        print(json.dumps(result | {"format": "huggingface" if args.to_hf else "orbax", "seconds": seconds}))
    else:
        kind = "two towers" if made.two_towers else "a backbone"
        experts = f", experts {args.experts}" if args.experts else ""
        print(f"wrote {made.target}: {kind}, {made.parameters:,} parameters{experts}, {seconds:.1f} s")
    return 0

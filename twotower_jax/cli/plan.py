"""What a model needs of devices to rent."""

import argparse
import json

from twotower_jax.cli.options import add_json, add_placement, asked_placement
from twotower_jax.config import EXPERT_BITS
from twotower_jax.decoding import MODES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", metavar="CONFIG", help="released, mid, a config.json, or a model as for generate")
    add("--devices", required=True, metavar="TARGET", help="h100xN, h200xN, or a TPU slice such as v5e:4x4")
    add("--rows", type=int, default=32, help="that are written at a time (32)")
    add("--context", type=int, default=8192, metavar="N", help="tokens of a row, prompt and new ones (8192)")
    add("--mode", choices=MODES, default="diffusion")
    add("--block-size", type=int, default=16, metavar="S", help="positions denoised together (16)")
    add("--dtype", default="bfloat16", help="bfloat16 (default) or float32")
    add("--experts", choices=EXPERT_BITS, help="quantised, as convert makes them (as the model has them)")
    add("--largest", action="store_true", help="find the largest number of rows that fits, too")
    add_placement(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Compile every program of the engine for devices that need not be there, and say what it needs of them.

    The exit status is 1 if it does not fit.
    """
    from twotower_jax import plan_report

    names = ("devices", "rows", "context", "mode", "block_size", "dtype", "experts", "largest")
    result = plan_report.make(args.config, asked_placement(args), **{name: getattr(args, name) for name in names})
    print(json.dumps(result) if args.json else result["table"])
    return 0 if result["fits"] else 1

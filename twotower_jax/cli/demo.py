"""See the modes at work."""

import argparse
import json

from twotower_jax.cli.options import add_json, add_placement, asked_placement


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_placement(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """A tour of about a minute: the shipped model answers the same prompts in each mode."""
    from twotower_jax.tour import tour

    result = tour(asked_placement(args))
    if args.json:
        print(json.dumps(result))
        return 0
    for name, mode in result["modes"].items():
        print(f"{name}: {mode['about']}")
        for row in mode["rows"]:
            print(f"  {'right' if row['right'] else 'wrong'}  {row['prompt']}{row['text']}")
        print(f"  {mode['exact_match']:.0%} right, {mode['tokens_per_forward']:.2f} tokens per forward\n")
    print(f"{result['seconds']:.2f} s, and {result['compile_seconds']:.1f} s to compile")
    return 0

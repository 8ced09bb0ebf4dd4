"""The model of a run so far."""

import argparse
import json

from twotower_jax.cli.options import add_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", metavar="CONFIG", help="the run's TOML file")
    add("target", metavar="DST", help="the folder to make")
    add("--step", type=int, metavar="N", help="of the checkpoint (the newest)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write the model that a run has made so far, from one of its checkpoints."""
    from twotower_jax import sources
    from twotower_jax.training.config import read_training_config
    from twotower_jax.training.start import Start
    from twotower_jax.training.state import export

    config = read_training_config(sources.user_path(args.config))
    target = sources.user_path(args.target)
    step = export(config, Start(config), target, args.step)
    print(json.dumps({"target": str(target), "step": step}) if args.json else f"wrote {target}: step {step}")
    return 0

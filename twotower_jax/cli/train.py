"""Train a model."""

import argparse
import dataclasses
import json

from twotower_jax.cli.options import add_job, add_json, add_mesh


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a TOML file; see twotower_jax/training/config.py")
    add_mesh(parser, "how all devices divide the model and the rows: data, expert, tensor (all data)")
    add_job(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Train a backbone, or a denoiser for one; a run that was stopped goes on where it was."""
    import jax

    from twotower_jax import distributed, sources
    from twotower_jax.placement import parse_mesh
    from twotower_jax.training.config import read_training_config
    from twotower_jax.training.loop import run
    from twotower_jax.training.start import Start

    config = read_training_config(sources.user_path(args.config))
    mesh = None if args.mesh is None else parse_mesh(args.mesh)
    distributed.join(args.coordinator, args.processes, args.process)
    ended = run(config, Start(config, mesh))
    if jax.process_index() > 0:
        pass  # the first process speaks
    elif args.json:
        print(json.dumps(dataclasses.asdict(ended) | {"output": config.output}))
    elif ended.finished:
        print(f"trained {ended.step} steps; the model is {config.output}/model")
    else:
        print(f"stopped and saved after {ended.step} of {config.steps} steps; the same command goes on")
    return 0 if ended.finished else 130

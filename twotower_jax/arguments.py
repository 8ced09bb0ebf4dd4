"""What the command line takes."""

import argparse
from collections.abc import Callable, Mapping

from twotower_jax.decoding import MODES


def parser(commands: Mapping[str, Callable]) -> argparse.ArgumentParser:
    """What parses the command line.

    Args:
      commands: by name, what runs each; its docstring describes it.
    """
    parser = argparse.ArgumentParser(prog="twotower", description="Nemotron-TwoTower in JAX.")
    added = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (add, about) in COMMANDS.items():
        command = added.add_parser(name, help=about, description=commands[name].__doc__)
        command.set_defaults(run=commands[name])
        add(command)
    return parser


class _Prompt(argparse.Action):
    """Collects prompts of all kinds in the order given, as (kind, value)."""

    def __call__(self, parser, namespace, value, option_string=None):
        namespace.prompts = [*(namespace.prompts or []), (self.dest, value)]


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(prompts=None)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, a shipped model (demo) or a Hugging Face id")
    once = {"action": _Prompt, "default": argparse.SUPPRESS}
    add("--prompt", **once, metavar="TEXT", help="a prompt; every --prompt, --prompt-file and --ids is a row")
    add("--prompt-file", **once, metavar="FILE", help="a file that is one prompt, but for a last newline; - is stdin")
    add("--ids", **once, metavar="IDS", help="a prompt as token ids: 5,7,9")
    add("--mode", choices=MODES, default="diffusion")
    add("--dtype", default="bfloat16", help="bfloat16 (default) or float32")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="new tokens a row (128)")
    add(
        "--eos-token-id",
        action="append",
        metavar="ID",
        help="id that ends a row, or none (config.json's)",
    )
    add("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    add("--top-k", type=int, metavar="K", help="draw from the K most probable tokens")
    add("--seed", type=int, default=0, help="of the random draws (0)")
    add("--top-p", type=float, metavar="P", help="ar, mock-ar: draw from the nucleus of mass P")
    add("--block-size", type=int, metavar="S", help="diffusion: positions denoised together (16)")
    add("--steps-per-block", type=int, metavar="T", help="diffusion: most denoiser passes a block (16)")
    add("--confidence-threshold", type=float, metavar="GAMMA", help="diffusion: commit predictions above it (0.8)")
    add("--mask-token-id", type=int, metavar="ID", help="diffusion: the id of [MASK] (3)")
    _add_placement(parser)
    _add_job(parser)
    _add_json(parser)


def _add_batch(parser: argparse.ArgumentParser) -> None:
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
    _add_placement(parser)
    _add_job(parser)
    _add_json(parser)


def _add_placement(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--context-devices",
        metavar="N,N",
        help="the context tower's, from 0 (the first half, of two or more)",
    )
    add("--denoiser-devices", metavar="N,N", help="the denoiser's (the second half)")
    _add_mesh(parser, "how a tower's devices divide it: data, expert, tensor (expert first)")


def _add_mesh(parser: argparse.ArgumentParser, about: str) -> None:
    parser.add_argument("--mesh", metavar="AXIS=N,...", help=about)


def _add_job(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--coordinator", metavar="HOST:PORT", help="of a job of several processes; auto where JAX knows the launcher")
    add("--processes", type=int, metavar="N", help="how many there are")
    add("--process", type=int, metavar="I", help="which one this is, from 0")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SRC", help="a folder (NVIDIA's layout, a backbone or a converted one) or a Hugging Face id")
    add("target", metavar="DST", help="the folder to make")
    add("--two-towers", action="store_true", help="make two towers of a backbone, ready to train")
    add("--to-hf", action="store_true", help="write NVIDIA's layout (safetensors) instead of ours (Orbax)")
    _add_json(parser)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    _add_placement(parser)
    _add_json(parser)


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a TOML file; see twotower_jax/training/config.py")
    _add_mesh(parser, "how all devices divide the model and the rows: data, expert, tensor (all data)")
    _add_job(parser)
    _add_json(parser)


def _add_export(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", metavar="CONFIG", help="the run's TOML file")
    add("target", metavar="DST", help="the folder to make")
    add("--step", type=int, metavar="N", help="of the checkpoint (the newest)")
    _add_json(parser)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a config.json, or a model as for generate")
    add("--devices", required=True, metavar="TARGET", help="h100xN, h200xN, or a TPU slice such as v5e:4x4")
    add("--rows", type=int, default=32, help="that are written at a time (32)")
    add("--context", type=int, default=8192, metavar="N", help="tokens of a row, prompt and new ones (8192)")
    add("--mode", choices=MODES, default="diffusion")
    add("--block-size", type=int, default=16, metavar="S", help="positions denoised together (16)")
    add("--dtype", default="bfloat16", help="bfloat16 (default) or float32")
    add("--largest", action="store_true", help="find the largest number of rows that fits, too")
    _add_placement(parser)
    _add_json(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


COMMANDS = {
    "generate": (_add_generate, "write text"),
    "batch": (_add_batch, "answer a file of requests"),
    "convert": (_add_convert, "convert a checkpoint"),
    "demo": (_add_demo, "see the modes at work"),
    "train": (_add_train, "train a model"),
    "plan": (_add_plan, "what a model needs of devices to rent"),
    "export": (_add_export, "the model of a run so far"),
}

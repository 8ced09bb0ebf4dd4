"""What several commands take."""

import argparse

from twotower_jax.errors import InputError


def add_placement(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--context-devices",
        metavar="N,N",
        help="the context tower's, from 0 (the first half, of two or more)",
    )
    add("--denoiser-devices", metavar="N,N", help="the denoiser's (the second half)")
    add_mesh(parser, "how a tower's devices divide it: data, expert, tensor (expert first)")


def add_mesh(parser: argparse.ArgumentParser, about: str) -> None:
    parser.add_argument("--mesh", metavar="AXIS=N,...", help=about)


def add_job(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--coordinator", metavar="HOST:PORT", help="of a job of several processes; auto where JAX knows the launcher")
    add("--processes", type=int, metavar="N", help="how many there are")
    add("--process", type=int, metavar="I", help="which one this is, from 0")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def asked_placement(args: argparse.Namespace):
    """The devices that were asked for."""
    from twotower_jax.placement import Placement, parse_devices, parse_mesh

    return Placement(
        parse_devices("--context-devices", args.context_devices),
        parse_devices("--denoiser-devices", args.denoiser_devices),
        None if args.mesh is None else parse_mesh(args.mesh),
    )


def stop_ids(given: list[str]) -> list[int]:
    if given == ["none"]:
        return []
    try:
        return [int(text) for text in given]
    except ValueError:
        raise InputError(f"--eos-token-id takes whole numbers, or none alone, not {' '.join(given)}") from None

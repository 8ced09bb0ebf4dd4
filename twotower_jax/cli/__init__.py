"""The command, `twotower`: a file for each of its own commands."""

import argparse
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Sequence

from twotower_jax import interrupts
from twotower_jax.cli import batch, bench, convert, demo, eval, export, generate, plan, score, train
from twotower_jax.errors import InputError

COMMANDS = (generate, batch, score, eval, convert, demo, train, plan, bench, export)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 if a row or the output failed, 2 for bad input, 130 when interrupted."""
    args = _parser().parse_args(argv)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:  # not under nohup
                signal.signal(number, signal.default_int_handler)  # leaves as tidily as Ctrl-C does
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without Unicode
    try:
        with interrupts.deferred():  # JAX, cut in its start, says things of its own
            import twotower_jax.model  # noqa: F401
        status = args.run(args)
        sys.stdout.flush()
        return status
    except InputError as error:
        for line in str(error).splitlines():
            print(f"twotower: {line}", file=sys.stderr)
        return 2
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # `| head` wants no more
            print(f"twotower: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered
        return _leave(1)
    except KeyboardInterrupt:
        print("twotower: interrupted", file=sys.stderr)
        return _leave(130)
    except Exception as error:
        if _of_devices(error):
            print(f"twotower: the devices gave up: {str(error).strip().splitlines()[0]}", file=sys.stderr)
            return _leave(1)
        traceback.print_exc()
        return _leave(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="twotower", description="Nemotron-TwoTower in JAX.")
    added = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        command = added.add_parser(name, help=module.__doc__, description=module.run.__doc__)
        command.set_defaults(run=module.run)
        module.add_arguments(command)
    return parser


def _of_devices(error: Exception) -> bool:
    """Whether XLA says it: memory that ran out, another process that has ended."""
    import jax

    status = re.match("(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED): ", str(error))
    return isinstance(error, jax.errors.JaxRuntimeError) or (isinstance(error, ValueError) and status is not None)


def _leave(status: int) -> int:
    """The exit status. In a job of several processes, at once: JAX would wait for the others, and speak of them."""
    from twotower_jax import distributed

    if distributed.joined():
        sys.stderr.flush()
        os._exit(status)
    return status

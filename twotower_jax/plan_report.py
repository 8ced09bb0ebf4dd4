"""A plan for named devices: its table, and how many rows fit."""

import dataclasses
import sys
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from twotower_jax import inputs, sources
from twotower_jax.config import with_quantized_experts
from twotower_jax.errors import InputError
from twotower_jax.placement import Placement, place
from twotower_jax.plan import Plan, Wish, plan
from twotower_jax.targets import target

USABLE = 0.97  # of a device's memory; the rest is the driver's and the runtime's
PLANS = 8  # that the search for the most rows makes at most
CLOSE = 0.04  # to the most rows, as a share, is enough


def make(
    config: str | Path,
    placement: Placement,
    *,
    devices: str,
    rows: int,
    context: int,
    mode: str,
    block_size: int,
    dtype: str,
    experts: str | None,
    largest: bool,
) -> dict[str, Any]:
    """Plans a generation on devices that `targets.target` knows; says on stderr what is compiled.

    Returns:
      what was asked for, the versions, the `Plan` as a dict, whether it `fits`, `largest_rows` or None, and a `table`
      to be read.

    Raises:
      InputError: what is asked for cannot be, or a program does not fit.
    """
    dimensions, backbone = sources.config_alone(config)
    if backbone and mode != "ar":
        raise InputError(
            f"{config} is of a backbone, which has no denoiser; give --mode ar, or two towers' config.json"
        )
    if experts is not None:
        dimensions = with_quantized_experts(dimensions, experts)
    context = inputs.whole("--context", context, 2, 2**24)
    block_size = inputs.whole("--block-size", block_size, 1, context)
    rows = inputs.whole("--rows", rows, 1, 2**20)
    numbers = inputs.dtype(dtype)
    found = target(devices)
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read programs for devices that are not there
    towers = place(placement, dimensions, two_towers=not backbone, devices=found.devices)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    refused = ""

    def of(rows: int) -> Plan | None:
        nonlocal refused
        try:
            wish = Wish(mode, rows, context, block_size, numbers)
            return plan(dimensions, towers, wish, found.compilers, say)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise InputError(f"{devices}: the compiler gives up: {str(error).splitlines()[0]}") from None
            refused = f"{rows} rows of {context} tokens do not fit {devices}: {str(error).splitlines()[0]}"
            say(refused)
            return None

    for line in filter(None, (found.note, str(towers))):
        say(line)
    made = of(rows)
    most = None
    if largest:
        step = towers.context.row_shards * (2 if towers.split else 1)
        begin = -(-rows // step) * step
        room = int(found.memory * USABLE)
        most = largest_rows(lambda n: made if n == rows else of(n), begin, step, room)
        if made is None and most:
            rows, made = most, of(most)
    if made is None:
        raise InputError(refused)
    about = {"date": str(date.today()), "jax": version("jax"), "config": str(config), "devices": devices}
    about |= {"note": found.note, "towers": str(towers), "mode": mode, "dtype": dtype}
    about |= {"experts": dimensions.expert_form, "rows": rows, "context": context}
    text = table(made, found.memory) + ("" if most is None else f"\nrows of {context} tokens that fit: {most}")
    fits = max(made.needed.values()) <= found.memory * USABLE
    return about | dataclasses.asdict(made) | {"fits": fits, "largest_rows": most, "table": text}


def largest_rows(make: Callable[[int], Plan | None], rows: int, step: int, room: int) -> int:
    """The most rows that are found to fit in a few plans, mostly within `CLOSE` of what does; 0 if none do.

    Memory grows by about as much with every row: a line through two plans, or one and its parameters, gives the next
    guess. In case it does not grow so, every other guess halves what is left between what fits and what does not.

    Args:
      make: the plan for a number of rows, or None if the compiler refuses it.
      rows: where to begin, a multiple of `step`.
      step: rows come in multiples of this.
      room: bytes of a device.
    """
    low, high, doubted = 0, None, False  # fits; does not; whether memory grows by as much with every row
    known: dict[int, Plan] = {}
    guess = rows
    for turn in range(PLANS):
        plan = make(guess)
        if plan is not None:
            known[guess] = plan
        if plan is not None and max(plan.needed.values()) <= room:
            low = guess
        else:
            high = guess
        line = _on_a_line(known, room) // step * step if known else 0
        if high is not None and high - low <= max(step, CLOSE * low):
            break
        if high is None and line > (1 + CLOSE) * low:
            guess = min(line, 4 * low)
        elif high is None:  # the line ends here: a little more should not fit
            low_again = low if doubted else low * CLOSE
            guess = int(low + low_again) // step * step + step
            doubted = True
        elif low < line < high and turn % 2 == 0:
            guess = line
        else:
            guess = (low + high) // 2 // step * step
    return low


def _on_a_line(known: dict[int, Plan], room: int) -> int:
    """Where the line through the two plans nearest to the room meets it."""
    at = sorted(known, key=lambda rows: abs(max(known[rows].needed.values()) - room))[:2]
    found = []
    for home, needed in known[at[0]].needed.items():
        start, base = (at[1], known[at[1]].needed[home]) if len(at) > 1 else (0, known[at[0]].parameters[home])
        found.append(at[0] + (room - needed) / max(1.0, (needed - base) / (at[0] - start)))
    return int(min(found))


def table(plan: Plan, memory: int) -> str:
    """A plan to be read, in GB of a device."""
    lines = [
        f"{'program':20} {'arguments':>10} {'outputs':>10} {'temporary':>10} {'compiled':>9}  collectives, each once"
    ]
    for home, programs in plan.programs.items():
        for name, p in programs.items():
            sent = ", ".join(f"{count} {kind} {size / 1e6:.1f} MB" for kind, (count, size) in p.collectives.items())
            sizes = " ".join(f"{size / 1e9:7.2f} GB" for size in (p.arguments, p.outputs, p.temporaries))
            lines.append(f"{home + ' ' + name:20} {sizes} {p.seconds:7.0f} s  {sent or 'none'}")
            lines += [f"  makes an array of the size of weights: {copy}" for copy in sorted(set(p.copies))]
    for home, needed in plan.needed.items():
        parts = f"{plan.parameters[home] / 1e9:.2f} GB of parameters"
        if home in plan.states:
            parts += f", {plan.states[home] / 1e9:.2f} GB of states"
        verdict = "fits" if needed <= memory * USABLE else "does not fit"
        lines.append(
            f"{home}: {needed / 1e9:.2f} GB a device ({parts}); {verdict} into {memory * USABLE / 1e9:.2f} GB, "
            f"which is {USABLE:.0%} of its memory"
        )
    if plan.moved:
        parts = ", ".join(f"{name} {size / 1e6:.2f}" for name, size in plan.moved.items())
        lines.append(f"moved between towers for each block of a row: {sum(plan.moved.values()) / 1e6:.2f} MB ({parts})")
    return "\n".join(lines)

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
from twotower_jax.errors import InputError
from twotower_jax.placement import Placement, place
from twotower_jax.plan import Plan, Wish, plan
from twotower_jax.targets import target

USABLE = 0.97  # of a device's memory; the rest is the driver's and the runtime's


def make(
    config: str | Path,
    placement: Placement,
    *,
    devices: str,
    rows: int,
    context: int,
    max_new_tokens: int,
    mode: str,
    block_size: int,
    dtype: str,
    largest: bool,
) -> dict[str, Any]:
    """Plans a generation on devices that `targets.target` knows; says on stderr what is compiled.

    Returns:
      what was asked for, the versions, the `Plan` as a dict, `largest_rows` or None, and `table`, all of it to be read.

    Raises:
      InputError: what is asked for cannot be, or a program does not fit.
    """
    dimensions = sources.config_alone(config)
    context = inputs.whole("--context", context, 2, 2**24)
    max_new_tokens = inputs.whole("--max-new-tokens", max_new_tokens, 1, context - 1)
    block_size = inputs.whole("--block-size", block_size, 1, max_new_tokens)
    rows = inputs.whole("--rows", rows, 1, 2**20)
    found = target(devices)
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read programs for devices that are not there
    towers = place(placement, dimensions, two_towers=True, devices=found.devices)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def of(rows: int) -> Plan:
        try:
            wish = Wish(mode, rows, context, max_new_tokens, block_size, inputs.dtype(dtype))
            return plan(dimensions, towers, wish, say)
        except jax.errors.JaxRuntimeError as error:
            first = str(error).partition("\n")[0]
            raise InputError(f"{rows} rows of {context} tokens do not fit {devices}: {first}") from None

    for line in filter(None, (found.note, str(towers))):
        say(line)
    made = of(rows)
    most = None
    if largest:
        step = towers.context.row_shards * (2 if towers.split and mode != "ar" else 1)
        most, _ = largest_rows(of, made, rows, step, found.memory)
    about = {"date": str(date.today()), "jax": version("jax"), "config": str(config), "devices": devices}
    about |= {"note": found.note, "towers": str(towers), "mode": mode, "dtype": dtype, "rows": rows, "context": context}
    text = table(made, found.memory) + ("" if most is None else f"\nrows of {context} tokens that fit: {most}")
    return about | dataclasses.asdict(made) | {"largest_rows": most, "table": text}


def largest_rows(make: Callable[[int], Plan], plan: Plan, rows: int, step: int, memory: int) -> tuple[int, Plan | None]:
    """The most rows that were found to fit, and their plan: the bytes grow by about as much with every row.

    Args:
      make: the plan for a number of rows.
      plan: that of `rows`.
      rows: a multiple of `step`.
      step: rows come in multiples of this.
      memory: of a device.
    """
    room = int(memory * USABLE)

    def fits(p: Plan) -> bool:
        return all(needed <= room for needed in p.needed.values())

    def guess(at: int, p: Plan, by: int, q: Plan | None) -> int:
        """Where a line through one plan, and the parameters alone or another plan, meets the room."""
        found = []
        for home, needed in p.needed.items():
            base, start = (q.needed[home], by) if q else (p.parameters[home], 0)
            a_row = max(1, (needed - base) / (at - start))
            found.append(start + (room - base) / a_row)
        return int(min(found)) // step * step

    best = (rows, plan) if fits(plan) else (0, None)
    at, by, other = rows, 0, None
    for _ in range(3):
        wanted = guess(at, plan, by, other)
        if wanted <= best[0] or wanted in (at, by):
            break
        try:
            found = make(wanted)
        except InputError:  # a compiler that refuses what does not fit
            break
        at, by, other, plan = wanted, at, plan, found
        if fits(plan) and at > best[0]:
            best = (at, plan)
    return best


def table(plan: Plan, memory: int) -> str:
    """A plan to be read, in GB of a device."""
    lines = [f"{'program':20} {'arguments':>10} {'outputs':>10} {'temporary':>10} {'compiled':>9}  collectives"]
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

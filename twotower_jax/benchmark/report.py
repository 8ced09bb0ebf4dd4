"""Measures a model on this machine: what is measured, its table."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from twotower_jax import memory
from twotower_jax.benchmark import clock, decoding, limits, machine, pieces, rows
from twotower_jax.benchmark.pieces import Setting
from twotower_jax.benchmark.subject import Subject
from twotower_jax.engine.sizes import capacity_of
from twotower_jax.errors import InputError
from twotower_jax.state import state_bytes

BLOCK = 16
MASK = 3


def measure(
    subject: Subject,
    counts: Sequence[int],
    *,
    context: int,
    new_tokens: int,
    passes: Sequence[float],
    apart: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """All that the command prints, as JSON has it.

    Args:
      subject: the model.
      counts: of rows.
      context: tokens that rows have read, a multiple of the block size.
      new_tokens: that rows write through the engine.
      passes: of the denoiser, that a block takes with random weights.
      apart: one tower is there at a time, and the engine is not run.
      say: is told what is done.

    Raises:
      InputError: it does not fit the device, or is asked of a model that cannot do it.
    """
    if apart and subject.trained:
        raise InputError("one tower at a time is for random weights; a loaded model has both")
    names = tuple(subject.description)
    capacity = capacity_of(context + new_tokens)
    needed = subject.bytes(*names[:1] if apart else names)
    needed += state_bytes(subject.config, max(counts), capacity, subject.dtype)
    what = f"{subject.name}{' (one tower)' * apart} with {max(counts)} rows of {context + new_tokens} tokens"
    memory.require(0 if subject.trained else needed, subject.group.devices[0], what)
    subject.hold(*names[:1] if apart else names)
    made = {"capacity": capacity, "block_size": BLOCK}
    read = rows.read(subject.config, subject.group, subject.params, max(counts), context, **made)
    shared = (subject.config, subject.group, subject.dtype, read)
    settings = {n: Setting(*shared, n, context, mask_id=MASK, **made) for n in counts}
    timed, sizes = [], {}
    for name in names:
        params = subject.hold(name) if apart else subject.params
        sizes[name] = limits.array_bytes(params[name])
        for n, piece in _pieces(name, params, settings):
            say(f"{n} rows: {piece.name}")
            timed.append((n, piece.name, piece.work, piece.experts, pieces.timed(piece, subject.group, params)))
    rates = []
    for n in counts:
        say(f"{n} rows: tokens per second")
        if subject.trained:
            rates += decoding.trained(subject.model(), subject.prompts, n, new_tokens)
            continue
        if not apart:
            rates += decoding.fixed(subject.model(), read, n, context, new_tokens, BLOCK, passes)
        took = {name: found.seconds.median for rows, name, _, _, found in timed if rows == n}
        rates += decoding.from_pieces(n, took, BLOCK, passes)
    peak = machine.peak_memory()  # before that of the device's rates
    of_device = machine.rates(subject.dtype)
    return {
        "model": subject.name,
        "weights": "trained" if subject.trained else "random",
        **machine.about(),
        "dtype": subject.dtype.name,
        "experts": subject.config.expert_form,
        "pattern": subject.config.pattern,
        "parameter_bytes": sizes,
        "context": context,
        "block_size": BLOCK,
        "new_tokens": new_tokens,
        "one_tower_at_a_time": apart,
        "rates": dataclasses.asdict(of_device),
        "memory": peak,
        "pieces": [_as_result(*found, of_device) for found in timed],
        "decoding": [dataclasses.asdict(rate) for rate in rates],
    }


def _pieces(tower: str, params: dict, settings: dict[int, Setting]) -> Iterator[tuple[int, pieces.Piece]]:
    """A tower's, with the number of rows."""
    if tower == "denoiser":
        some = next(iter(settings.values()))
        choices = rows.denoised(some.config, some.group, params, some.read, BLOCK, MASK)
    for n, setting in settings.items():
        if tower == "denoiser":
            found = pieces.denoiser_pieces(setting, params[tower], choices)
        else:
            found = pieces.context_pieces(setting, params[tower])
        for piece in found:
            yield n, piece


def _as_result(
    n: int, name: str, work: limits.Work, experts: float | None, timed: pieces.Timed, rates: machine.Rates
) -> dict[str, Any]:
    least = work.seconds(rates)
    return {
        "rows": n,
        "piece": name,
        "seconds": timed.seconds.median,
        "seconds_least": timed.seconds.least,
        "bytes": work.bytes,
        "operations": work.operations,
        "limit_seconds": least,
        "bound": work.bound(rates),
        "share_of_limit": least / timed.seconds.median,
        "experts_a_layer": experts,
        "compile_seconds": timed.compile_seconds,
        "temporary_bytes": timed.temporary_bytes,
    }


def table(result: dict[str, Any]) -> str:
    """A result to be read."""
    rates, memory = result["rates"], result["memory"]
    sizes = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in result["parameter_bytes"].items())
    read, copied, operations = rates["read"] / 1e9, rates["copied"] / 1e9, rates["operations"] / 1e12
    lines = [
        f"{result['model']}, {result['weights']} weights in {result['dtype']} ({sizes}), on {result['device']} with "
        f"{result['cores']} cores; jax {result['jax']}, {result['date']}",
        f"the device reads {read:.4g} GB/s, copies {copied:.4g} GB/s (both ways counted), multiplies "
        f"{operations:.3g} TFLOP/s; {memory['peak_bytes'] / 1e9:.3g} GB at most of the {memory['of']}",
        "",
        f"after {result['context']} tokens; ms are the median, and the least, of {clock.SAMPLES} samples",
        f"{'rows':>5} {'piece':20} {'ms':>9} {'least':>9} {'GB':>8} {'GFLOP':>8} {'limit ms':>9} {'share':>6} "
        f"{'experts':>7} {'compiled':>9}",
    ]
    for p in result["pieces"]:
        experts = "" if p["experts_a_layer"] is None else f"{p['experts_a_layer']:.1f}"
        lines.append(
            f"{p['rows']:5} {p['piece']:20} {1e3 * p['seconds']:9.3f} {1e3 * p['seconds_least']:9.3f} "
            f"{p['bytes'] / 1e9:8.4f} {p['operations'] / 1e9:8.3f} {1e3 * p['limit_seconds']:9.3f} "
            f"{p['share_of_limit']:6.1%} {experts:>7} {p['compile_seconds']:7.1f} s"
        )
    lines += ["", f"{'rows':>5} {'mode':10} {'schedule':40} {'tokens/s':>9} {'with prompts':>12}  source"]
    for r in result["decoding"]:
        whole = "" if r["with_prompts"] is None else f"{r['with_prompts']:.1f}"
        schedule = r["schedule"]
        if r["tokens_per_forward"] is not None:
            schedule += f", {r['tokens_per_forward']:.2f} tokens a pass"
        lines.append(
            f"{r['rows']:5} {r['mode']:10} {schedule:40} {r['tokens_per_second']:9.1f} {whole:>12}  {r['source']}"
        )
    return "\n".join(lines)

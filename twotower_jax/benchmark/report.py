"""Measures a model on this machine: what is measured, its table."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from twotower_jax import memory
from twotower_jax.benchmark import clock, decoding, limits, machine, pieces, rows
from twotower_jax.benchmark.subject import Subject
from twotower_jax.engine.sizes import capacity_of
from twotower_jax.errors import InputError
from twotower_jax.state import state_bytes

BLOCK = 16
MASK = 3
FIRST = ("AR step", "denoiser pass")  # of the pieces of so many rows


def measure(
    subject: Subject,
    counts: Sequence[int],
    *,
    context: int,
    new_tokens: int,
    passes: Sequence[float],
    apart: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """All that the command prints, as JSON has it: after every piece and every rate what is known by then.

    Every program is compiled before the first is timed, and nothing else is at work in that time.

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
    capacity, most = capacity_of(context + new_tokens), max(counts)
    needed = subject.bytes(*names[:1] if apart else names)
    needed += state_bytes(subject.config, most, capacity, subject.dtype)
    what = f"{subject.name}{' (one tower)' * apart} with {most} rows of {context + new_tokens} tokens"
    memory.require(0 if subject.trained else needed, subject.group.devices[0], what)
    say("the device's rates")
    of_device = machine.rates(subject.dtype)
    before = machine.peak_memory()

    shapes, programs = subject.shapes, subject.programs
    reader = rows.Reader(programs, subject.config, subject.group, capacity, BLOCK, MASK)
    made = [
        piece
        for n in counts
        for piece in _pieces(pieces.Setting(subject.config, subject.dtype, n, context, capacity, BLOCK, MASK), shapes)
    ]
    engines = [_engine(subject, n, context, new_tokens, passes) for n in counts if not apart]
    say(f"compiling, {programs.threads} programs at a time")
    start = time.perf_counter()
    reader.begin(shapes)
    for piece in made:
        pieces.begin(piece, programs, subject.group, shapes)
    for engine in engines:
        engine.begin(subject.model(shapes))
    programs.finish()
    result = {
        "model": subject.name,
        "weights": "trained" if subject.trained else "random",
        **machine.about(),
        "dtype": subject.dtype.name,
        "experts": subject.config.expert_form,
        "pattern": subject.config.pattern,
        "parameter_bytes": {name: limits.array_bytes(shapes[name]) for name in names},
        "context": context,
        "block_size": BLOCK,
        "new_tokens": new_tokens,
        "one_tower_at_a_time": apart,
        "rates": dataclasses.asdict(of_device),
        "compile_seconds": time.perf_counter() - start,
        "pieces": [],
        "decoding": [],
        "memory": None,
        "finished": False,
    }
    yield result

    subject.hold(*names[:1] if apart else names)
    say(f"reading {most} rows")
    read = reader.read(subject.params, most, context)
    for held in [(name,) for name in names] if apart else [names]:
        params = subject.hold(*held)
        if "denoiser" in held:
            read = reader.denoised(params, read)
        for piece in made:
            if piece.home in held:
                given = piece.given(read)
                timed = pieces.timed(piece, given, programs, subject.group, params)
                result["pieces"].append(_as_result(piece, given, timed, of_device))
                yield result
    for n, engine in itertools.zip_longest(counts, engines):
        took = {piece["piece"]: piece["seconds"] for piece in result["pieces"] if piece["rows"] == n}
        derived = [] if subject.trained else decoding.from_pieces(n, took, BLOCK, passes)
        for rate in itertools.chain(engine.rates(subject.model()) if engine else (), derived):
            result["decoding"].append(dataclasses.asdict(rate))
            yield result
    result |= {"memory": machine.peak_memory(before), "finished": True}
    yield result


def _pieces(setting: pieces.Setting, shapes: dict) -> list[pieces.Piece]:
    """Of so many rows, those first that matter most."""
    found = list(pieces.context_pieces(setting, shapes["context"]))
    if "denoiser" in shapes:
        found += pieces.denoiser_pieces(setting, shapes["denoiser"])
    return sorted(found, key=lambda piece: piece.name not in FIRST)


def _engine(
    subject: Subject, n: int, context: int, new_tokens: int, passes: Sequence[float]
) -> decoding.Fixed | decoding.Trained:
    if subject.trained:
        return decoding.Trained(n, subject.prompts, new_tokens)
    return decoding.Fixed(n, rows.tokens_of(subject.config, n, context), new_tokens, BLOCK, passes)


def _as_result(piece: pieces.Piece, given: pieces.Given, timed: pieces.Timed, rates: machine.Rates) -> dict[str, Any]:
    work = given.work
    least = work.seconds(rates)
    return {
        "rows": piece.rows,
        "piece": piece.name,
        "seconds": timed.seconds.median,
        "seconds_least": timed.seconds.least,
        "bytes": work.bytes,
        "operations": work.operations,
        "limit_seconds": least,
        "bound": work.bound(rates),
        "share_of_limit": least / timed.seconds.median,
        "experts_a_layer": given.experts,
        "compile_seconds": timed.compile_seconds,
        "temporary_bytes": timed.temporary_bytes,
    }


def table(result: dict[str, Any]) -> list[str]:
    """The lines of a result, to be read; those of one that is not finished are the first ones of what it becomes."""
    rates = result["rates"]
    sizes = ", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in result["parameter_bytes"].items())
    read, copied, operations = rates["read"] / 1e9, rates["copied"] / 1e9, rates["operations"] / 1e12
    lines = [
        f"{result['model']}, {result['weights']} weights in {result['dtype']} ({sizes}), on {result['device']} with "
        f"{result['cores']} cores; jax {result['jax']}, {result['date']}",
        f"the device reads {read:.4g} GB/s, copies {copied:.4g} GB/s (both ways counted), multiplies "
        f"{operations:.3g} TFLOP/s; all programs were compiled in {result['compile_seconds']:.1f} s",
        "",
        f"after {result['context']} tokens; ms are the median, and the least, of {clock.SAMPLES} samples",
        f"{'rows':>5} {'piece':20} {'ms':>9} {'least':>9} {'GB':>8} {'GFLOP':>8} {'limit ms':>9} {'share':>6} "
        f"{'experts':>7} {'compiled':>9}",
        *map(_of_piece, result["pieces"]),
    ]
    if result["decoding"]:
        lines += ["", f"{'rows':>5} {'mode':10} {'schedule':40} {'tokens/s':>9} {'with prompts':>12}  source"]
        lines += map(_of_rate, result["decoding"])
    if (used := result["memory"]) is not None:
        most = "at most" if used["exact"] else "or less (it is what the device's rates took)"
        lines += ["", f"{used['peak_bytes'] / 1e9:.3g} GB {most} of the {used['of']}'s memory"]
    return lines


def _of_piece(p: dict[str, Any]) -> str:
    experts = "" if p["experts_a_layer"] is None else f"{p['experts_a_layer']:.1f}"
    return (
        f"{p['rows']:5} {p['piece']:20} {1e3 * p['seconds']:9.3f} {1e3 * p['seconds_least']:9.3f} "
        f"{p['bytes'] / 1e9:8.4f} {p['operations'] / 1e9:8.3f} {1e3 * p['limit_seconds']:9.3f} "
        f"{p['share_of_limit']:6.1%} {experts:>7} {p['compile_seconds']:7.1f} s"
    )


def _of_rate(r: dict[str, Any]) -> str:
    whole = "" if r["with_prompts"] is None else f"{r['with_prompts']:.1f}"
    schedule = r["schedule"]
    if r["tokens_per_forward"] is not None:
        schedule += f", {r['tokens_per_forward']:.2f} tokens a pass"
    return f"{r['rows']:5} {r['mode']:10} {schedule:40} {r['tokens_per_second']:9.1f} {whole:>12}  {r['source']}"

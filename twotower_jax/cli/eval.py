"""Run benchmarks by lm-evaluation-harness."""

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import shlex
import sys
import time
from pathlib import Path

from twotower_jax.cli.options import add_json, add_placement, asked_placement
from twotower_jax.decoding import MODES
from twotower_jax.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="as for generate")
    add("--tasks", required=True, metavar="NAME,...", help="of benchmarks of the paper, or of the harness's tasks")
    add("--include", metavar="FOLDER", help="tasks of your own, in the harness's format")
    add("--modes", default="ar,diffusion", metavar="MODE,...", help=f"of {', '.join(MODES)} (ar,diffusion)")
    add("--limit", type=int, metavar="N", help="questions of each task, the first ones (all)")
    add("--likelihood", default="context", metavar="TOWER", help="whose diffusion has: context (default) or denoiser")
    add("--samples", type=int, default=16, metavar="N", help="denoiser: masks of each block that its bound takes (16)")
    add("--dtype", default="bfloat16", help="bfloat16 (default) or float32")
    add("--block-size", type=int, metavar="S", help="diffusion, verified: positions denoised together (16)")
    add("--steps-per-block", type=int, metavar="T", help="diffusion: most denoiser passes a block (16)")
    add("--confidence-threshold", type=float, metavar="GAMMA", help="the same: commit predictions above it (0.8)")
    add("--slots", type=int, metavar="N", help="rows that are written at a time (as many as fit and pay)")
    add("--run-code", action="store_true", help="run programs that the model writes: humaneval, mbpp_sanitized")
    add("--out", metavar="FILE", help="write the results as JSON")
    add_placement(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run tasks of lm-evaluation-harness in several modes, and print what came of it beside the published figures.

    The paper's benchmarks are mmlu, mmlu_pro, arc_challenge, winogrande, race, humaneval, mbpp_sanitized, gsm8k,
    math_500, global_mmlu_lite and mgsm, with NVIDIA's shots. The exit status is 1 if a row ended early.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise InputError('eval needs lm-evaluation-harness: pip install "twotower_jax[eval]"') from None
    from twotower_jax import inputs, sources
    from twotower_jax.evaluation import benchmarks, harness, report

    modes = _names("--modes", args.modes)
    if args.likelihood not in harness.LIKELIHOODS:
        raise InputError(f"--likelihood takes {' or '.join(harness.LIKELIHOODS)}, not {args.likelihood}")
    limit = None if args.limit is None else inputs.whole("--limit", args.limit, 1)
    out = None if args.out is None else sources.user_path(args.out)
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise InputError(f"--out {out}: " + ("it is a folder" if out.is_dir() else f"there is no folder {out.parent}"))
    for mode in modes:
        if mode not in MODES:
            raise InputError(f"--modes: {mode} does not exist; choose {', '.join(MODES)}")
    include = None if args.include is None else sources.user_path(args.include)
    if include is not None and not include.is_dir():
        raise InputError(f"--include {include} is no folder")
    found, manager = benchmarks.find(_names("--tasks", args.tasks), include)
    loaded = report.load_tasks(found, manager, args.run_code)
    model, tokenizer, prefix = harness.load(args.model, args.dtype, asked_placement(args))
    print(model.towers, file=sys.stderr)
    decoding = {name: getattr(args, name) for name in ("block_size", "steps_per_block", "confidence_threshold")}
    settings = {"likelihood": args.likelihood, "samples": args.samples, "limit": limit, "slots": args.slots, **decoding}
    options = {"modes": modes, "run_code": args.run_code, "prefix_token_id": prefix, "name": args.model}
    start = time.time()
    rows = report.evaluate(model, tokenizer, loaded, manager, **options, **settings)
    result = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
        "command": shlex.join(["twotower", *sys.argv[1:]]),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("twotower_jax", "jax", "lm_eval", "datasets")},
        "model": args.model,
        "dtype": args.dtype,
        "devices": str(model.towers),
        "settings": settings,
        "seconds": time.time() - start,
        "benchmarks": [dataclasses.asdict(row) for row in rows],
    }
    print(json.dumps(result) if args.json else report.table(rows, modes), flush=True)
    if out is not None:
        Path(out).write_text(json.dumps(result, indent=1) + "\n")
    errors = list(dict.fromkeys(error for row in rows for mode in row.modes.values() for error in mode.errors))
    for error in errors:
        print(f"twotower: {error}", file=sys.stderr)
    return 1 if errors else 0


def _names(option: str, text: str) -> list[str]:
    """`a,b` as a list, each name once."""
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise InputError(f"{option} takes names such as a,b, each once, not {text!r}")
    return names

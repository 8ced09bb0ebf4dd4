"""The command: `twotower generate | batch | demo | convert | train | export | plan`."""

import argparse
import dataclasses
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence

from twotower_jax import interrupts
from twotower_jax.arguments import parser
from twotower_jax.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 if a row or the output failed, 2 for bad input, 130 when interrupted."""
    args = parser(COMMANDS).parse_args(argv)
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


def _stop_ids(given: list[str]) -> list[int]:
    if given == ["none"]:
        return []
    try:
        return [int(text) for text in given]
    except ValueError:
        raise InputError(f"--eos-token-id takes whole numbers, or none alone, not {' '.join(given)}") from None


def _convert(args: argparse.Namespace) -> int:
    """Convert a checkpoint: Hugging Face's layouts to ours, or back."""
    from convert import convert

    start = time.perf_counter()
    made = convert(args.source, args.target, two_towers=args.two_towers, hf=args.to_hf)
    seconds = time.perf_counter() - start
    if args.json:
        result = {"target": str(made.target), "two_towers": made.two_towers, "parameters": made.parameters}
        print(json.dumps(result | {"format": "huggingface" if args.to_hf else "orbax", "seconds": seconds}))
    else:
        kind = "two towers" if made.two_towers else "a backbone"
        print(f"wrote {made.target}: {kind}, {made.parameters:,} parameters, {seconds:.1f} s")
    return 0


def _placement(args: argparse.Namespace):
    """The devices that were asked for."""
    from twotower_jax.placement import Placement, parse_devices, parse_mesh

    return Placement(
        parse_devices("--context-devices", args.context_devices),
        parse_devices("--denoiser-devices", args.denoiser_devices),
        None if args.mesh is None else parse_mesh(args.mesh),
    )


def _demo(args: argparse.Namespace) -> int:
    """A tour of about a minute: the shipped model answers the same prompts in each mode."""
    from twotower_jax.programs import keep_between_runs
    from twotower_jax.tour import tour

    keep_between_runs()
    result = tour(_placement(args))
    if args.json:
        print(json.dumps(result))
        return 0
    for name, mode in result["modes"].items():
        print(f"{name}: {mode['about']}")
        for row in mode["rows"]:
            print(f"  {'right' if row['right'] else 'wrong'}  {row['prompt']}{row['text']}")
        print(f"  {mode['exact_match']:.0%} right, {mode['tokens_per_forward']:.2f} tokens per forward\n")
    print(f"{result['seconds']:.2f} s, and {result['compile_seconds']:.1f} s to compile")
    return 0


def _batch(args: argparse.Namespace) -> int:
    """Answer every line of a file once, in OpenAI's batch format; a job that was stopped goes on where it was."""
    import twotower_jax as tt
    from twotower_jax import distributed, inputs, sources
    from twotower_jax.engine import cluster, files, job
    from twotower_jax.placement import shared
    from twotower_jax.programs import keep_between_runs
    from twotower_jax.tokenizer import load_tokenizer

    if args.json and args.target == files.STANDARD:
        raise InputError("--json prints the summary where the results go; give OUT a name")
    shard = re.fullmatch(r"(\d{1,9})/(\d{1,9})", args.shard)
    if shard is None or not int(shard[1]) < int(shard[2]):
        raise InputError(f"--shard takes I/N with I from 0 to N - 1, such as 0/4, not {args.shard!r}")
    options = job.Options(
        defaults={
            "mode": args.mode,
            "max_new_tokens": inputs.whole("--max-new-tokens", args.max_new_tokens, 0, 2**30),
        },
        eos=None if args.eos_token_id is None else _stop_ids(args.eos_token_id),
        slots=None if args.slots is None else inputs.whole("--slots", args.slots, 1, 2**20),
        memory=None if args.memory is None else int(1e9 * inputs.number("--memory", args.memory, 0, 1e6)),
        positions=inputs.whole("--context", job.POSITIONS if args.context is None else args.context, 1, 2**31 - 1),
        shard=(int(shard[1]), int(shard[2])),
    )
    if args.ray is not None:
        if args.coordinator is not None:
            raise InputError("--ray and --coordinator are two ways to use many machines; give one")
        actors = inputs.whole("--ray", args.ray, 1, 2**20)
        placement = _placement(args)
        made = {"dtype": args.dtype, "actors": actors, "gpus": args.gpus, "placement": placement}
        summary = cluster.run(args.model, args.source, args.target, options, **made)
    else:
        distributed.join(args.coordinator, args.processes, args.process)
        with distributed.quiet():
            with distributed.checked_together() as said:
                said += [sorted((k, str(v)) for k, v in vars(args).items() if k not in ("process", "run"))]
                folder = sources.locate(args.model)
                tokenizer = load_tokenizer(folder)
                placement = shared(_placement(args), not sources.config_alone(folder)[1])
            keep_between_runs()
            model = tt.load(folder, dtype=args.dtype, placement=placement)
            if distributed.first():
                print(model.towers, file=sys.stderr)
            summary = job.run(model, tokenizer, args.source, args.target, options, args.model)
    if distributed.first():
        print(summary, file=sys.stderr)
        if args.json:
            print(json.dumps(dataclasses.asdict(summary)))
    if summary.interrupted:
        print(job.STOPPED, file=sys.stderr)
        return 130
    return 1 if summary.errors else 0


def _train(args: argparse.Namespace) -> int:
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


def _plan(args: argparse.Namespace) -> int:
    """Compile every program of the engine for devices that need not be there, and say what it needs of them.

    The exit status is 1 if it does not fit.
    """
    from twotower_jax import plan_report

    names = ("devices", "rows", "context", "mode", "block_size", "dtype", "largest")
    result = plan_report.make(args.config, _placement(args), **{name: getattr(args, name) for name in names})
    print(json.dumps(result) if args.json else result["table"])
    return 0 if result["fits"] else 1


def _export(args: argparse.Namespace) -> int:
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


def _generate(args: argparse.Namespace) -> int:
    """Generate text by mask diffusion, by the context tower alone (ar) or by the denoiser token by token (mock-ar)."""
    import jax

    import twotower_jax as tt
    from twotower_jax import distributed, sources
    from twotower_jax.programs import keep_between_runs
    from twotower_jax.tokenizer import load_tokenizer

    distributed.join(args.coordinator, args.processes, args.process)
    with distributed.quiet():
        with distributed.checked_together() as said:
            said += [sorted((name, str(value)) for name, value in vars(args).items() if name not in ("process", "run"))]
            placement = _placement(args)
            options = _decoding_options(args)
            folder = sources.locate(args.model)
            tokenizer = load_tokenizer(folder)
            texts = [_read(value) if kind == "prompt_file" else value for kind, value in args.prompts or []]
            kinds = [kind for kind, _ in args.prompts or []]
            prompts = [_encode(kind, text, tokenizer, args.model) for kind, text in zip(kinds, texts, strict=True)]
            if not prompts:
                raise InputError("give a prompt: --prompt TEXT, --prompt-file FILE or --ids 5,7,9")
            eos = None if args.eos_token_id is None else _stop_ids(args.eos_token_id)
        keep_between_runs()
        model = tt.load(folder, dtype=args.dtype, placement=placement)
        if jax.device_count() > 1 and jax.process_index() == 0:
            print(model.towers, file=sys.stderr)
        eos = model.config.eos_token_ids if eos is None else eos
        generate = {
            "diffusion": model.generate_mask_diffusion,
            "ar": model.generate_ar,
            "mock-ar": model.generate_mock_ar,
        }[args.mode]
        result = generate(prompts, eos_token_id=eos, **options)

    def decode(ids: Sequence[int]) -> str | None:
        return None if tokenizer is None else tokenizer.decode(ids)

    rows = [
        {
            "prompt": decode(ids) if kind == "ids" else text,
            "text": decode([token for token in tokens if token not in eos]),
            "prompt_tokens": len(ids),
            "tokens": tokens,
            "forwards": forwards,
            "tokens_per_forward": len(tokens) / forwards if forwards else None,
            "error": error,
        }
        for kind, text, ids, tokens, forwards, error in zip(
            kinds, texts, prompts, result.tokens, result.forwards, result.errors, strict=True
        )
    ]
    if jax.process_index() > 0:
        pass  # the first process speaks
    elif args.json:
        times = {"seconds": result.seconds, "compile_seconds": result.compile_seconds}
        print(json.dumps({"model": args.model, "mode": args.mode, "dtype": args.dtype, "rows": rows} | times))
    else:
        for row in rows:
            _print_row(row)
        print(f"{result.seconds:.2f} s, and {result.compile_seconds:.1f} s to compile")
    return 1 if any(result.errors) else 0


def _decoding_options(args: argparse.Namespace) -> dict:
    """The options that were given, if they are of the mode."""
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}
    diffusion = ("block_size", "steps_per_block", "confidence_threshold", "mask_token_id")
    for name in ("top_k", "top_p", *diffusion):
        if (value := getattr(args, name)) is None:
            continue
        if (name in diffusion) != (args.mode == "diffusion") and name != "top_k":
            raise InputError(f"--{name.replace('_', '-')} is no option of --mode {args.mode}")
        options[name] = value
    return options


def _encode(kind: str, value: str, tokenizer, model: str) -> list[int]:
    """A prompt's token ids."""
    if kind == "ids":
        parts = [part.strip() for part in (value.split(",") if "," in value else value.split())]
        if not all(re.fullmatch("-?[0-9]{1,100}", part) for part in parts):
            raise InputError(f"--ids takes whole numbers such as 5,7,9, not {value!r}")
        return [int(part) for part in parts]
    if tokenizer is None:
        raise InputError(f"{model} has no tokenizer.json, so give the prompt as token ids: --ids 5,7,9")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt is not text in this terminal's encoding: {error.reason}") from None
    return tokenizer.encode(value).ids


def _read(file: str) -> str:
    try:
        with open(0 if file == "-" else file, encoding="utf-8", newline="", closefd=file != "-") as handle:
            return handle.read().removesuffix("\n").removesuffix("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {error}") from None


def _print_row(row: dict) -> None:
    count, forwards = len(row["tokens"]), row["forwards"]
    print(" ".join(map(str, row["tokens"])) if row["text"] is None else row["prompt"] + row["text"])
    rate = "" if row["tokens_per_forward"] is None else f", {row['tokens_per_forward']:.2f} tokens per forward"
    print(f"[{count} tokens, {forwards} forwards{rate}]")
    if row["error"]:
        print(f"[{row['error']}]")


COMMANDS = {
    "generate": _generate,
    "batch": _batch,
    "convert": _convert,
    "demo": _demo,
    "train": _train,
    "plan": _plan,
    "export": _export,
}


if __name__ == "__main__":
    sys.exit(main())

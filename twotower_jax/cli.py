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
from collections.abc import Sequence

from twotower_jax import interrupts
from twotower_jax.errors import InputError

MODES = ("diffusion", "ar", "mock-ar")


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
        return 1
    except KeyboardInterrupt:
        print("twotower: interrupted", file=sys.stderr)
        return _leave(130)
    except RuntimeError as error:
        if not _of_devices(error):
            raise
        print(f"twotower: the devices gave up: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return _leave(1)


def _of_devices(error: RuntimeError) -> bool:
    """Whether XLA says it: memory that ran out, another process that has ended."""
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError)


def _leave(status: int) -> int:
    """The exit status. In a job of several processes, at once: JAX would wait for the others, and speak of them."""
    from twotower_jax import distributed

    if distributed.joined():
        sys.stderr.flush()
        os._exit(status)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="twotower", description="Nemotron-TwoTower in JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="write text", description=_generate.__doc__))
    _add_batch(commands.add_parser("batch", help="answer a file of requests", description=_batch.__doc__))
    _add_convert(commands.add_parser("convert", help="convert a checkpoint", description=_convert.__doc__))
    _add_demo(commands.add_parser("demo", help="see the modes at work", description=_demo.__doc__))
    _add_train(commands.add_parser("train", help="train a model", description=_train.__doc__))
    _add_plan(commands.add_parser("plan", help="what a model needs of devices to rent", description=_plan.__doc__))
    _add_export(commands.add_parser("export", help="the model of a run so far", description=_export.__doc__))
    return parser


class _Prompt(argparse.Action):
    """Collects prompts of all kinds in the order given, as (kind, value)."""

    def __call__(self, parser, namespace, value, option_string=None):
        namespace.prompts = [*(namespace.prompts or []), (self.dest, value)]


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_generate, prompts=None)
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
    parser.set_defaults(run=_batch)
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
    add("--mesh", metavar="AXIS=N,...", help="how a tower's devices divide it: data, expert, tensor (expert first)")


def _add_job(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--coordinator", metavar="HOST:PORT", help="of a job of several processes; auto where JAX knows the launcher")
    add("--processes", type=int, metavar="N", help="how many there are")
    add("--process", type=int, metavar="I", help="which one this is, from 0")


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_convert)
    add = parser.add_argument
    add("source", metavar="SRC", help="a folder (NVIDIA's layout, a backbone or a converted one) or a Hugging Face id")
    add("target", metavar="DST", help="the folder to make")
    add("--two-towers", action="store_true", help="make two towers of a backbone, ready to train")
    add("--to-hf", action="store_true", help="write NVIDIA's layout (safetensors) instead of ours (Orbax)")
    _add_json(parser)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_demo)
    _add_placement(parser)
    _add_json(parser)


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_train)
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a TOML file; see twotower_jax/training/config.py")
    _add_job(parser)
    _add_json(parser)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_export)
    add = parser.add_argument
    add("config", metavar="CONFIG", help="the run's TOML file")
    add("target", metavar="DST", help="the folder to make")
    add("--step", type=int, metavar="N", help="of the checkpoint (the newest)")
    _add_json(parser)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_plan)
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a config.json, or a model as for generate")
    add("--devices", required=True, metavar="TARGET", help="h100xN, h200xN, or a TPU slice such as v5e:4x4")
    add("--rows", type=int, default=32, help="of a batch (32)")
    add("--context", type=int, default=8192, metavar="N", help="tokens of a row, prompt and new ones (8192)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="new ones among them (128)")
    add("--mode", choices=MODES, default="diffusion")
    add("--block-size", type=int, default=16, metavar="S", help="positions denoised together (16)")
    add("--dtype", default="bfloat16", help="bfloat16 (default) or float32")
    add("--largest", action="store_true", help="find the largest number of rows that fits, too")
    _add_placement(parser)
    _add_json(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


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
        print("twotower: stopped before the end; the same command goes on", file=sys.stderr)
        return 130
    return 1 if summary.errors else 0


def _train(args: argparse.Namespace) -> int:
    """Train a backbone, or a denoiser for one; a run that was stopped goes on where it was."""
    import jax

    from twotower_jax import distributed, sources
    from twotower_jax.training.config import read_training_config
    from twotower_jax.training.loop import run
    from twotower_jax.training.start import Start

    config = read_training_config(sources.user_path(args.config))
    distributed.join(args.coordinator, args.processes, args.process)
    ended = run(config, Start(config))
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
    """Compile every program of a generation for devices that need not be there, and say what it needs of them.

    The exit status is 1 if it does not fit.
    """
    from twotower_jax import plan_report

    names = ("devices", "rows", "context", "max_new_tokens", "mode", "block_size", "dtype", "largest")
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


if __name__ == "__main__":
    sys.exit(main())

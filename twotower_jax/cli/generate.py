"""Write text."""

import argparse
import json
import re
import sys
from collections.abc import Sequence

from twotower_jax.cli.options import add_job, add_json, add_placement, asked_placement, stop_ids
from twotower_jax.decoding import BLOCK_MODES, MODES
from twotower_jax.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
    add("--top-p", type=float, metavar="P", help="ar, mock-ar, verified: draw from the nucleus of mass P")
    add("--block-size", type=int, metavar="S", help="diffusion, verified: positions denoised together (16)")
    add("--steps-per-block", type=int, metavar="T", help="diffusion: most denoiser passes a block (16)")
    add("--confidence-threshold", type=float, metavar="GAMMA", help="both: commit predictions above it (0.8)")
    add(
        "--unmasking",
        metavar="RULE",
        help="both: another rule: factor, entropy, margin, credit, remask; or RULE=NUMBER",
    )
    add("--mask-token-id", type=int, metavar="ID", help="both: the id of [MASK] (3)")
    add("--draft-passes", type=int, metavar="K", help="verified: most denoiser passes a block (as many as pay)")
    add("--accept-probability", type=float, metavar="P", help="verified: accept drafts that ar gives at least P, too")
    add("--trace", metavar="FILE", help="draw how the texts came to be: FILE.html, FILE.gif or FILE.png")
    add_placement(parser)
    add_job(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Generate text by mask diffusion, by the context tower alone (ar), as ar but in blocks that the denoiser drafts
    (verified), or by the denoiser token by token (mock-ar).
    """
    import jax

    import twotower_jax as tt
    from twotower_jax import distributed, sources, trace
    from twotower_jax.tokenizer import load_tokenizer
    from twotower_jax.trace.recorder import Recorder

    distributed.join(args.coordinator, args.processes, args.process)
    with distributed.quiet():
        with distributed.checked_together() as said:
            said += [sorted((name, str(value)) for name, value in vars(args).items() if name not in ("process", "run"))]
            placement = asked_placement(args)
            options = _decoding_options(args)
            folder = sources.locate(args.model)
            tokenizer = load_tokenizer(folder)
            texts = [_read(value) if kind == "prompt_file" else value for kind, value in args.prompts or []]
            kinds = [kind for kind, _ in args.prompts or []]
            prompts = [_encode(kind, text, tokenizer, args.model) for kind, text in zip(kinds, texts, strict=True)]
            if not prompts:
                raise InputError("give a prompt: --prompt TEXT, --prompt-file FILE or --ids 5,7,9")
            eos = None if args.eos_token_id is None else stop_ids(args.eos_token_id)
            if args.trace is not None:
                trace.check(args.trace)
        model = tt.load(folder, dtype=args.dtype, placement=placement)
        if jax.device_count() > 1 and jax.process_index() == 0:
            print(model.towers, file=sys.stderr)
        eos = model.config.eos_token_ids if eos is None else eos
        recorder = None if args.trace is None else Recorder(args.mode, prompts)
        result = model.generate(args.mode, prompts, eos_token_id=eos, watch=recorder, **options)

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
    sys.stdout.flush()
    if recorder is not None and jax.process_index() == 0:
        settings = {name: value for name, value in options.items() if value is not None}
        trace.draw(recorder.trace(args.model, settings, lambda i: decode([i]) or f"⟨{i}⟩"), args.trace)
    return 1 if any(result.errors) else 0


class _Prompt(argparse.Action):
    """Collects prompts of all kinds in the order given, as (kind, value)."""

    def __call__(self, parser, namespace, value, option_string=None):
        namespace.prompts = [*(namespace.prompts or []), (self.dest, value)]


OPTIONS = {  # of the modes that have them
    "top_k": MODES,
    "top_p": ("ar", "mock-ar", "verified"),
    "block_size": BLOCK_MODES,
    "steps_per_block": ("diffusion",),
    "confidence_threshold": BLOCK_MODES,
    "unmasking": BLOCK_MODES,
    "mask_token_id": BLOCK_MODES,
    "draft_passes": ("verified",),
    "accept_probability": ("verified",),
}


def _decoding_options(args: argparse.Namespace) -> dict:
    """The options that were given, if they are of the mode."""
    options = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "seed": args.seed}
    for name, modes in OPTIONS.items():
        if (value := getattr(args, name)) is None:
            continue
        if args.mode not in modes:
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

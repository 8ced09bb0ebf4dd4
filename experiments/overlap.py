"""Whether one tower reads while the other denoises: a profiler's trace of towers on devices of their own.

    python -m experiments.overlap [--model demo] [--rows 32] [--new-tokens 64] [--dtype float32]

Without two GPUs: XLA_FLAGS=--xla_force_host_platform_device_count=2, whose devices share the machine's cores. Writes
`results/overlap-DEVICE.json`: seconds in which each tower's device was at work, and in which both were.
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.profiler import ProfileData

import twotower_jax as tt
from experiments import harness


def busy(trace: Path) -> dict[str, list[tuple[float, float]]]:
    """Of each device, when programs were at work on it: intervals in seconds that do not meet."""
    (file,) = trace.rglob("*.xplane.pb")
    found: dict[str, list[tuple[float, float]]] = {}
    for plane in ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                about = dict(event.stats)
                if "hlo_module" in about:
                    here = plane.name.startswith("/device:")
                    device = plane.name if here else f"cpu {about['device_ordinal']}"
                    found.setdefault(device, []).append((event.start_ns / 1e9, event.end_ns / 1e9))
    return {device: joined(intervals) for device, intervals in sorted(found.items())}


def joined(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same times, each once."""
    result: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def seconds(intervals: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)


def common(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    """Seconds that lie in both."""
    return seconds(one) + seconds(other) - seconds(joined(one + other))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    model = tt.load(args.model, dtype=args.dtype, placement=tt.Placement([0], [1]))
    rng = np.random.default_rng(0)
    prompts = rng.integers(4, model.config.vocab_size, (args.rows, 24)).tolist()
    result = {"model": args.model, "dtype": args.dtype, "new_tokens": args.new_tokens}
    for rows in (args.rows, 1):  # of one row there are no halves: the towers wait for each other
        options = {"max_new_tokens": args.new_tokens}
        model.generate_mask_diffusion(prompts[:rows], **options)
        with tempfile.TemporaryDirectory() as trace:
            with jax.profiler.trace(trace):
                model.generate_mask_diffusion(prompts[:rows], **options)
            (first, context), (second, denoiser) = busy(Path(trace)).items()
        both = common(context, denoiser)
        result[f"{rows} rows"] = {
            "context": {"device": first, "busy_seconds": seconds(context)},
            "denoiser": {"device": second, "busy_seconds": seconds(denoiser)},
            "both_busy_seconds": both,
            "share_of_context_time_with_denoiser_at_work": both / seconds(context),
        }
        print(f"{rows} rows: {result[f'{rows} rows']}")
    device = jax.devices()[0].device_kind.replace(" ", "-")
    file = harness.RESULTS / f"overlap-{device}.json"
    file.write_text(json.dumps(harness.about() | result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Draws what `twotower bench` wrote; of `mid` in float32 on 2 CPU cores it says how that stands to NVIDIA's code, too.

    python -m experiments.bench experiments/results/bench-mid-cpu.json

Writes a picture beside the file, and `...-reference.json` with the ratios to the figures in `reference.json`. Of a run
that was stopped (`....json.new`) what is there is drawn.
"""

import argparse
import json
import statistics
from pathlib import Path

from experiments import harness

REFERENCE = json.loads((harness.HOME / "reference.json").read_text())
ALIKE = ("model", "dtype", "platform", "cores")
MODES = {"ar": "AR", "diffusion": "diffusion", "verified": "verified"}
DRAWN = ("AR step", "denoiser pass", "commit", "verify")


def against_reference(result: dict) -> dict | None:
    """Ratios of tokens per second, prompts included, to NVIDIA's code, and their geometric mean.

    None if the result is of something else, or lacks the rows or the schedule.
    """
    if any(result[name] != REFERENCE[name] for name in ALIKE):
        return None
    passes = {"ar": None, "diffusion": REFERENCE["passes_per_block"]}
    measured = {
        (rate["mode"], str(rate["rows"]), rate["passes_per_block"]): rate["with_prompts"]
        for rate in result["decoding"]
        if rate["source"] == "engine"
    }
    ratios = {}
    for mode, figures in REFERENCE["tokens_per_second"].items():
        for rows, figure in figures.items():
            if (found := measured.get((mode, rows, passes[mode]))) is None:
                return None
            ratios[f"{mode}, rows {rows}"] = {"here": found, "reference": figure, "ratio": found / figure}
    mean = statistics.geometric_mean(entry["ratio"] for entry in ratios.values())
    about = {name: result[name] for name in ("date", "jax", "device", "cores", "context", "new_tokens", "rates")}
    return {"source": REFERENCE["source"], **about, "ratios": ratios, "geometric_mean": mean}


def draw(axes, result: dict) -> None:
    """Tokens per second by rows, of every mode and schedule; and the share of the limit that pieces reach."""
    speed, share = axes
    lines: dict[str, list[tuple[int, float]]] = {}
    derived = set()
    for rate in result["decoding"]:
        label = MODES[rate["mode"]] + ("" if rate["mode"] == "ar" else f", {rate['schedule']}")
        if rate["source"] == "pieces":
            label += ", of the pieces"
            derived.add(label)
        lines.setdefault(label, []).append((rate["rows"], rate["tokens_per_second"]))
    for label, points in lines.items():
        speed.plot(*zip(*points, strict=True), "--" if label in derived else "-", marker="o", markersize=3, label=label)
    speed.set(xlabel="rows", ylabel="tokens per second", xscale="log", yscale="log", title="Tokens per second")
    for name in DRAWN:
        points = [(p["rows"], 100 * p["share_of_limit"]) for p in result["pieces"] if p["piece"] == name]
        if points:
            share.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    share.set(xlabel="rows", ylabel="% of the limit", xscale="log", ylim=(0, 105), title="Share of the device's limit")
    rows = sorted({piece["rows"] for piece in result["pieces"]})
    for panel in axes:
        panel.set_xticks(rows, map(str, rows))
        panel.minorticks_off()
        if panel.lines:
            panel.legend(fontsize="small")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)


def main() -> None:
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    result = json.loads(file.read_text())
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    draw(axes, result)
    whole = result.get("finished", True)
    figure.suptitle(f"{result['model']}, {result['dtype']}, {result['device']}{'' if whole else '; not finished'}")
    picture = file.with_suffix(".png" if whole else ".new.png")
    figure.savefig(picture, dpi=130)
    print(f"written: {picture}")
    if whole and (compared := against_reference(result)) is not None:
        target = file.with_name(f"{file.stem}-reference.json")
        target.write_text(json.dumps(compared, indent=1) + "\n")
        for name, entry in compared["ratios"].items():
            print(f"{name}: {entry['here']:.1f} against {entry['reference']} tokens/s, {entry['ratio']:.2f} x")
        print(f"geometric mean {compared['geometric_mean']:.2f} x; {compared['source']}; written: {target}")


if __name__ == "__main__":
    main()

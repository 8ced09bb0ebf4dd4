"""The comparison with NVIDIA's figures: of the right runs alone."""

import json

import pytest

from experiments import bench
from experiments.bench import ALIKE, REFERENCE, against_reference


def result(factor, **changes):
    about = {name: REFERENCE[name] for name in ALIKE}
    about |= {"date": "", "jax": "", "device": "cpu", "context": 64, "new_tokens": 64, "rates": {}}
    rates = [
        {"mode": mode, "rows": int(rows), "source": "engine", "with_prompts": factor * figure}
        | {"passes_per_block": 16.0 if mode == "diffusion" else None}
        for mode, figures in REFERENCE["tokens_per_second"].items()
        for rows, figure in figures.items()
    ]
    return about | {"decoding": rates} | changes


def test_geometric_mean():
    found = against_reference(result(2))
    assert found["geometric_mean"] == pytest.approx(2)
    assert found["source"] == "figures of one run of NVIDIA's code on 2 cores"
    assert {name: entry["reference"] for name, entry in found["ratios"].items()} == {
        "ar, rows 1": 71,
        "ar, rows 8": 145,
        "diffusion, rows 1": 31,
        "diffusion, rows 8": 76,
    }


def test_what_is_not_alike_is_not_compared():
    assert against_reference(result(2, dtype="bfloat16")) is None
    assert against_reference(result(2, platform="gpu")) is None
    assert against_reference(result(2, cores=4)) is None
    fewer = result(2)
    fewer["decoding"] = [rate | {"passes_per_block": 5.0} for rate in fewer["decoding"]]
    assert against_reference(fewer) is None


@pytest.mark.parametrize("pieces", [0, 1])
def test_what_is_not_finished_is_drawn(pieces, tmp_path, monkeypatch):
    """As far as it is there, beside its file, under another name than the whole one's; and it is not compared."""
    pytest.importorskip("matplotlib").use("agg")
    piece = {"rows": 2, "piece": "AR step", "share_of_limit": 0.5}
    file = tmp_path / "bench-mid-cpu.json.new"
    file.write_text(json.dumps(result(2, decoding=[], pieces=[piece] * pieces, finished=False)))
    monkeypatch.setattr("sys.argv", ["bench", str(file)])
    bench.main()
    assert {path.name for path in tmp_path.iterdir()} == {file.name, "bench-mid-cpu.json.new.png"}

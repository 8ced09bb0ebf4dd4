"""The comparison with NVIDIA's figures: of the right runs alone."""

import pytest

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

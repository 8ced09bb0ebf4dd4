"""Every token, step and forward of the reference, in all modes and settings, as ragged batches and one by one."""

import functools

import jax
import numpy as np
import pytest
from conftest import Golden, byte_ids, golden_of, load

import twotower_jax as tt
from twotower_jax import two_tower
from twotower_jax.decoding import diffusion
from twotower_jax.decoding.block import masked_block
from twotower_jax.decoding.sampling import Sampler
from twotower_jax.decoding.unmasking import Unmasking
from twotower_jax.layers import expert_parallel, experts
from twotower_jax.layers.experts.grouped import grouped
from twotower_jax.layers.experts.megablox import Megablox
from twotower_jax.layers.experts.triton import Triton

SETTINGS = [(16, 16, 0.8), (16, 16, 0.3), (8, 8, 0.5), (16, 4, 0.6), (32, 32, 0.9), (4, 4, 0.0)]


def tag(setting) -> str:
    size, steps, gamma = setting
    return f"generate/diffusion/S{size}_T{steps}_g{gamma}"


def diffuse(golden: Golden, prompts, setting, **options):
    size, steps, gamma = setting
    return golden.model.generate_mask_diffusion(
        prompts, 64, block_size=size, steps_per_block=steps, confidence_threshold=gamma, **options
    )


BATCHES = [("ar", "ragged"), ("ar", "alone"), ("mock_ar", "ragged")]


@pytest.mark.parametrize(("mode", "batch"), [*BATCHES, pytest.param("mock_ar", "alone", marks=pytest.mark.slow)])
def test_one_by_one(golden, mode, batch):
    generate = golden.model.generate_ar if mode == "ar" else golden.model.generate_mock_ar
    rows = [golden.rows] if batch == "ragged" else [[row] for row in golden.rows]
    for group in rows:
        g = generate([golden.prompt(row) for row in group], 40)
        assert g.tokens == [golden[f"generate/{mode}/row{row}"].tolist() for row in group]
        assert g.forwards == [40] * len(group)


def test_backbone():
    golden = golden_of("backbone-0")
    expected = [golden[f"ar/row{row}"].tolist() for row in golden.rows]
    assert golden.model.generate_ar(golden.prompts, 24).tokens == expected
    assert [golden.model.generate_ar([ids], 24).tokens[0] for ids in golden.prompts] == expected


@pytest.mark.parametrize("setting", SETTINGS, ids=tag)
def test_diffusion(golden, setting):
    g = diffuse(golden, golden.prompts, setting)
    assert g.tokens == [golden[f"{tag(setting)}/row{row}/tokens"].tolist() for row in golden.rows]
    assert g.forwards == [int(golden[f"{tag(setting)}/row{row}/nfe"]) for row in golden.rows]
    assert g.errors == [None] * 4


WAYS = {name: experts.way(name, "cpu") for name in ("together", "in_tiles", "picked", "in_pieces")} | {
    "triton": functools.partial(grouped, Triton(interpret=True)),
    "megablox": functools.partial(grouped, Megablox(interpret=True)),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_the_experts(monkeypatch, way):
    """No token moves with the implementation that multiplies them, at one token or at many."""
    monkeypatch.setattr(expert_parallel, "routed", WAYS[way])
    golden, setting = golden_of("grouped-0"), SETTINGS[2]
    model = tt.load(golden.model_folder, dtype="float32")
    size, steps, gamma = setting
    g = model.generate_mask_diffusion(
        golden.prompts, 64, block_size=size, steps_per_block=steps, confidence_threshold=gamma
    )
    assert g.tokens == [golden[f"{tag(setting)}/row{row}/tokens"].tolist() for row in golden.rows]
    assert model.generate_ar([golden.prompt(0)], 8).tokens == [golden["generate/ar/row0"][:8].tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS[:3], ids=tag)
def test_diffusion_alone(golden, setting):
    for row in golden.rows:
        g = diffuse(golden, [golden.prompt(row)], setting)
        assert g.tokens[0] == golden[f"{tag(setting)}/row{row}/tokens"].tolist()
        assert g.forwards[0] == golden[f"{tag(setting)}/row{row}/nfe"]


@pytest.mark.parametrize("setting", SETTINGS, ids=tag)
def test_diffusion_stops_at_eos(golden, setting):
    """The reference stops after the block; we give its tokens up to the EOS, and its forwards up to that block."""
    size = setting[0]
    for row in golden.rows:
        prefix = f"{tag(setting)}/row{row}"
        eos, expected = int(golden[f"{prefix}/eos_id"]), golden[f"{prefix}/eos_tokens"].tolist()
        # In a batch with all others, which do not all stop where this row does.
        g = diffuse(golden, golden.prompts, setting, eos_token_id=eos)
        assert g.tokens[row] == expected[: expected.index(eos) + 1]
        blocks = len(expected) // size
        assert g.forwards[row] == (golden[f"{prefix}/trace"][:, 0] < blocks).sum()


@pytest.mark.parametrize("setting", SETTINGS, ids=tag)
def test_diffusion_trace(golden, setting):
    """The step, un-looped, on a ragged batch: each row's block before every step is the reference's."""
    size, steps, gamma = setting
    model = golden.model
    c, params = model.config, model.params
    rules = diffusion.Diffusion(Sampler.of(0), Unmasking(np.float32(gamma), steps), 3)
    tokens = np.zeros((4, 48), np.int32)
    for row in golden.rows:
        tokens[row, : len(golden.prompt(row))] = golden.prompt(row)
    count = np.array([len(golden.prompt(row)) for row in golden.rows])
    _, state = jax.jit(two_tower.prefill, static_argnums=(0, 4))(c, params, tokens, count, 128)
    extend = jax.jit(two_tower.extend, static_argnums=0)
    step = jax.jit(diffusion.denoise_step, static_argnums=0)
    keys = jax.random.split(jax.random.key(0), (4, size))
    traces = [[] for _ in golden.rows]
    for index in range(64 // size):
        block = masked_block(np.ones(4, bool), np.full(4, size), size, 3)
        while block.masked.any():
            for row in np.flatnonzero(block.masked.any(1)):
                traces[row].append([index, int(block.step[row]), *block.tokens[row].tolist()])
            block = step(c, params, rules, state, block, keys)
        _, state = extend(c, params, state, block.tokens, np.full(4, size))
    for row in golden.rows:
        assert traces[row] == golden[f"{tag(setting)}/row{row}/trace"].tolist()


@pytest.mark.parametrize("mode", ["ar", "mock_ar", "g0.8_T16", "g0.5_T16", "g0.95_T16", "g0.8_T4"])
def test_trained(task_prompts, mode):
    """120 prompts of the trained model, as one ragged batch."""
    trained = load("trained-0")
    prompts = [byte_ids(p["prompt"]) for p in task_prompts]
    if mode.startswith("g"):
        gamma, steps = mode[1:].split("_T")
        g = trained.generate_mask_diffusion(
            prompts, 32, steps_per_block=int(steps), confidence_threshold=float(gamma), eos_token_id=14
        )
        assert g.forwards == [p[f"{mode}/forwards"] for p in task_prompts]
    else:
        g = (trained.generate_ar if mode == "ar" else trained.generate_mock_ar)(prompts, 32, eos_token_id=14)
    assert g.tokens == [p[mode] for p in task_prompts]

"""The tokens of one device, in float32, wherever the towers are and however they are divided."""

import functools

import jax
import pytest
from conftest import DATA

import twotower_jax as tt
from twotower_jax.placement import Towers
from twotower_jax.programs import Programs

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [20] * 17, [4], [9, 8, 7, 6, 5, 4, 3]]  # five: devices get copies to pad them
RUNS = {
    "ar": ("generate_ar", {}),
    "mock-ar": ("generate_mock_ar", {}),
    "diffusion": ("generate_mask_diffusion", {}),
    "diffusion with draws": ("generate_mask_diffusion", {"temperature": 1.0, "top_k": 9}),
    "verified": ("generate_verified", {"draft_passes": 1}),
    "ar with draws": ("generate_ar", {"temperature": 1.0, "top_p": 0.7}),
}
ALL = range(8)


def load(name, *wish):
    return tt.load(DATA / name, dtype="float32", placement=tt.Placement(*wish))


def run(model, name):
    method, options = RUNS[name]
    g = getattr(model, method)(PROMPTS, 20, seed=3, eos_token_id=[30, 40], **options)
    return g.tokens, g.forwards, g.errors


one_device = functools.cache(lambda name: load(name, [0], [0]))
expected = functools.cache(lambda model, name: run(one_device(model), name))

FAST = ["ar", "mock-ar", "diffusion"]
LATER = pytest.mark.slow
CASES = [
    pytest.param("tiny-0", ([0], [1], None), list(RUNS), id="split"),
    pytest.param("tiny-0", ([4, 5, 6, 7], [3, 2, 1, 0], {"expert": 2, "tensor": 2}), FAST, id="split, 2 x 2"),
    pytest.param("tiny-0", (ALL, ALL, {"expert": 8}), FAST, id="colocated, experts over 8"),
    pytest.param("grouped-0", (ALL, ALL, {"data": 2, "expert": 2, "tensor": 2}), FAST, id="grouped, 2 x 2 x 2"),
    pytest.param("trained-0", (range(4), range(4, 8), {"expert": 4}), ["diffusion"], id="trained, split, 4"),
    pytest.param("grouped-0", (ALL, ALL, {"expert": 8}), FAST, id="grouped, experts over 8", marks=LATER),
    pytest.param("grouped-0", ([1, 0], [5, 4], {"tensor": 2}), list(RUNS), id="grouped, split, tensor", marks=LATER),
    pytest.param("tiny-0", (ALL, ALL, {"expert": 4, "tensor": 2}), list(RUNS), id="4 x 2", marks=LATER),
    pytest.param("tiny-0", ([0, 1], [2, 3], {"data": 2}), FAST, id="split, rows over 2", marks=LATER),
    pytest.param("trained-0", (ALL, ALL, {"tensor": 2, "expert": 4}), list(RUNS), id="trained, 4 x 2", marks=LATER),
    pytest.param("trained-0", (ALL, ALL, {"tensor": 4, "expert": 2}), FAST, id="trained, 2 x 4", marks=LATER),
]


@pytest.mark.parametrize(("model", "wish", "runs"), CASES)
def test_tokens_of_one_device(model, wish, runs):
    placed = load(model, *wish)
    for name in runs:
        assert run(placed, name) == expected(model, name)


@pytest.mark.slow
def test_backbone():
    """One Mamba-2 group and one key/value head, which every device has."""
    whole, placed = (
        tt.load(DATA / "backbone-0", dtype="float32", placement=wish)
        for wish in (tt.Placement([0]), tt.Placement(range(4), mesh={"expert": 2, "tensor": 2}))
    )
    assert run(placed, "ar") == run(whole, "ar")


def test_logits():
    """To the last digits of float32, vocabulary, heads, channels and experts being divided."""
    placed = load("tiny-0", ALL, ALL, {"expert": 4, "tensor": 2})
    difference = placed.context_logits(PROMPTS[2]) - one_device("tiny-0").context_logits(PROMPTS[2])
    assert abs(difference).max() < 2e-5


def test_what_moves(monkeypatch):
    """Between the towers goes as much for each block whatever the context's length: its keys and values, the Mamba
    states, the tokens."""
    moved, move = [], Towers.move

    def counted(self, tree, specs, to):
        moved.append(sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
        return move(self, tree, specs, to)

    monkeypatch.setattr(Towers, "move", counted)
    model = load("tiny-0", [0], [1])
    c = model.config
    attention, mamba = c.pattern.count("*"), c.pattern.count("M")
    caches = attention * 2 * 16 * c.kv_heads * c.head_dim * 4
    states = mamba * 4 * (c.mamba_width * c.state_size + (c.conv_kernel - 1) * c.conv_channels)
    told, heard = 4 * (16 + 2), caches + states + 4 + 4  # tokens, how many, ticket; and length, which row
    for prompt in ([5] * 5, [5] * 300):
        moved.clear()
        model.generate_mask_diffusion([prompt], 48)
        rounds = moved[len(moved) % 2 :]  # before them came the prompt
        assert rounds[:6] == [told, heard] * 3


def test_lanes_take_turns(monkeypatch):
    """What is started, in order: on the denoiser's device one lane's block comes before the other's news, which wait
    for the context tower; so both towers have work."""
    started, run = [], Programs.run

    def noted(self, group, program, *arrays, **options):
        started.append((program.function.__name__, group.numbers[0]))
        return run(self, group, program, *arrays, **options)

    monkeypatch.setattr(Programs, "run", noted)
    load("tiny-0", [0], [1]).generate_mask_diffusion(PROMPTS, 48)
    mine = [name for name, device in started if device == 1 and not name.startswith("empty")]
    assert mine[:4] == ["follow", "seat", "denoise", "follow"]  # of one lane, then of the other
    turns = "".join({"denoise": "d", "absorb": "a"}.get(name, "") for name in mine)
    assert "daa" not in turns  # no lane's news before the other's block
    assert turns.startswith("ddadadadad")

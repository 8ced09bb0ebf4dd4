"""Verified decoding writes what AR writes, whatever the denoiser drafts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden_of, largest_difference, load
from streams import heard, random_requests

import twotower_jax as tt
from twotower_jax import sources, two_tower
from twotower_jax.engine import verified
from twotower_jax.engine.request import Request
from twotower_jax.engine.rows import EMPTY, as_rows
from twotower_jax.tokenizer import load_tokenizer

SIZES = range(4, 17)


@pytest.mark.parametrize(
    "name", ["tiny-0", *(pytest.param(name, marks=pytest.mark.slow) for name in ("grouped-0", "trained-0"))]
)
def test_text_is_ars(name):
    """Greedy and drawn, in ragged batches, beside rows of other modes, with ids that end rows; for all block sizes and
    numbers of draft passes, whether the denoiser is noise or half trained.
    """
    model = load(name)
    drafted = [("verified", size, bool(size % 2)) for size in SIZES]
    others = [("diffusion", 16, False), ("diffusion", 7, True)] if name == "tiny-0" else []
    asked = list(random_requests(model, 48, kinds=[*drafted, *others], rules=["threshold", "remask=0.3,0.9"]))
    as_ar = [dataclasses.replace(r, mode="ar" if r.mode == "verified" else r.mode) for r in asked]
    tokens, last = heard(model.stream(asked, slots=16))
    expected, _ = heard(model.stream(as_ar, slots=16))
    assert tokens == expected
    assert all(event.error is None for event in last.values())


def prompts_of_demo():
    folder = sources.locate("demo")
    tokenizer = load_tokenizer(folder)
    return [tokenizer.encode(sample["prompt"]).ids for sample in json.loads((folder / "samples.json").read_text())]


def test_drafts_are_accepted():
    """Of the shipped model several tokens a pass, greedy and drawn, for all block sizes and numbers of draft passes."""
    model, rng = load("demo"), np.random.default_rng(0)
    asked = [
        Request(i, ids, "verified", 33, int(size), draft_passes=[None, 1, 2, 4][i % 4], eos_token_id=14, **options)
        for options in ({}, {"temperature": 0.7, "seed": 5})
        for i, (ids, size) in enumerate(zip(prompts_of_demo(), rng.integers(4, 17, 99), strict=False))
    ]
    asked = [dataclasses.replace(r, key=i) for i, r in enumerate(asked)]
    tokens, last = heard(model.stream(asked, slots=8))
    expected, _ = heard(model.stream([dataclasses.replace(r, mode="ar") for r in asked], slots=8))
    assert tokens == expected
    assert sum(event.context_forwards for event in last.values()) < 0.5 * sum(map(len, expected.values()))


@pytest.mark.slow
def test_all_is_accepted_if_all_will_do(tiny):
    """At a probability that every token has, a pass after the first gives a whole block, the last token AR's."""
    g = tiny.model.generate_verified(tiny.prompts, 1 + 48, draft_passes=1, accept_probability=1e-30)
    assert [len(row) for row in g.tokens] == [49] * 4
    assert g.forwards == [4 + 3] * 4  # of the context tower, of the denoiser


def test_rejected_drafts_cost_little(tiny):
    """A denoiser of which AR accepts next to nothing is soon asked no more: little over a pass a token, and not two."""
    g = tiny.model.generate_verified(tiny.prompts, 1 + 48)
    assert 49 * 4 <= sum(g.forwards) < 1.4 * 49 * 4
    once = tiny.model.generate_verified(tiny.prompts, 1 + 48, draft_passes=1)
    assert sum(once.forwards) > 1.8 * 49 * 4


def test_held_is_what_is_right_up_to_the_end():
    """Against a plain loop: the tokens after the wrong one, moved to where the next draft has them, or none."""
    rng = np.random.default_rng(0)
    count, width, end = 300, 8, 5
    asked = [Request(i, [7], "verified", eos_token_id=end).checked(128, True) for i in range(count)]
    right = np.where(rng.random((count, width)) < 0.8, rng.integers(4, 9, (count, width)), EMPTY)
    kept = rng.integers(1, width + 1, count)
    found = verified._held(as_rows(asked, range(count)), jnp.asarray(right), jnp.asarray(kept))
    some = 0
    for row in range(count):
        after = right[row, kept[row] :].tolist()
        whole = after[: after.index(end) + 1] if end in after else []
        whole = [] if EMPTY in whole else whole
        some += bool(whole)
        expected = [EMPTY, *whole, *[EMPTY] * width][:width]
        assert found[row].tolist() == expected, (right[row], kept[row])
    assert 20 < some < count


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "trained-0"])
def test_in_bfloat16_near_ties_alone_differ(name):
    """Where a text is not AR's, AR's own logits were next to equal at the first token that differs."""
    model = load(name, "bfloat16")
    prompts = [r.prompt for r in random_requests(model, 24)]
    expected = model.generate_ar(prompts, 32).tokens
    found = model.generate_verified(prompts, 32).tokens
    for prompt, mine, other in zip(prompts, found, expected, strict=True):
        if mine != other:
            at = next(i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b)
            logits = model.context_logits([*prompt, *other[:at]])[-1]
            assert abs(logits[mine[at]] - logits[other[at]]) < 0.25


def test_settled_state_is_a_fresh_one(golden):
    """After any number of a block's tokens, it is what reading these alone gives."""
    c, params = golden.model.config, golden.model.params
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, c.vocab_size, (4, 40)).astype(np.int32)
    before = np.array([24, 1, 9, 20])
    prefill = jax.jit(two_tower.prefill, static_argnums=(0, 4))
    probe, settle = jax.jit(two_tower.probe, static_argnums=0), jax.jit(two_tower.settle)
    _, state = prefill(c, params, tokens, before, 64)
    block = np.stack([row[n : n + 16] for row, n in zip(tokens, before, strict=True)])
    _, probed = probe(c, params, state, block, np.full(4, 16))
    for kept in ([16, 0, 1, 9], [3, 16, 15, 2]):
        kept = np.array(kept)
        settled = settle(state, probed, kept)
        _, fresh = prefill(c, params, tokens, before + kept, 64)
        np.testing.assert_array_equal(settled.length, fresh.length)
        for layer, other in zip(settled.layers, fresh.layers, strict=True):
            if hasattr(layer, "ssm"):
                assert largest_difference(layer, other) < 1e-4
            elif layer is not None:
                for row, n in enumerate(settled.length):
                    np.testing.assert_allclose(layer.key[row, :, :n], other.key[row, :, :n], atol=1e-4)
                    np.testing.assert_allclose(layer.value[row, :, :n], other.value[row, :, :n], atol=1e-4)


def test_bad_options(tiny):
    for wrong, message in [
        ({"draft_passes": 0}, "draft_passes must be 1 or more|draft_passes must be from 1"),
        ({"accept_probability": 0}, "accept_probability must be a number, above 0 and at most 1"),
    ]:
        with pytest.raises(tt.InputError, match=message):
            tiny.model.generate_verified([[5]], **wrong)
    with pytest.raises(tt.InputError, match="generate_verified needs a denoiser"):
        golden_of("backbone-0").model.generate_verified([[5]])

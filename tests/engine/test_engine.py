"""Many rows at their own pace write what each writes alone."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from conftest import load
from plain import alone
from streams import MORE, PROMPTS, heard, random_requests

import twotower_jax as tt
from twotower_jax.decoding.unmasking import NAMES
from twotower_jax.engine import request, sizes
from twotower_jax.engine.request import Request
from twotower_jax.engine.rows import Kinds
from twotower_jax.engine.scheduler import Engine
from twotower_jax.engine.steps import feed
from twotower_jax.programs import Programs


def assert_as_alone(model, requests, slots):
    tokens, last = heard(model.stream(requests, slots=slots))
    assert set(last) == {r.key for r in requests}
    for r in requests:
        expected, passes = alone(model, r)
        assert tokens[r.key] == expected, r
        event = last[r.key]
        assert passes == (event.context_forwards if r.mode == "ar" else event.denoiser_forwards)
        assert event.end == ("stop" if expected and expected[-1] in r.eos_token_id else "length")


def test_rows_are_alone():
    model = load("tiny-0")
    assert_as_alone(model, list(random_requests(model, 30, rules=["threshold=0.2", "threshold=0.95"])), slots=8)


def test_a_shared_prefix_is_read_once(monkeypatch):
    """Prompts that begin with the same 70 tokens, some of them with no more; each writes what it writes otherwise."""
    model, read = load("tiny-0"), []
    run = Programs.run

    def noted(self, group, program, *arrays, **options):
        if program.function is feed:
            read.append(np.sum(arrays[2].count))
        return run(self, group, program, *arrays, **options)

    monkeypatch.setattr(Programs, "run", noted)
    shared = np.random.default_rng(0).integers(4, 128, 70).tolist()
    requests = [Request(i, shared + [9] * (i // 2), ["ar", "verified"][i % 2], max_new_tokens=18) for i in range(16)]
    tokens, _ = heard(model.stream(requests, slots=8))
    once = sum(read)
    assert once == 69 + sum(r.read_first - 69 for r in requests)
    monkeypatch.setattr(request, "SHARED", 71)
    apart, _ = heard(model.stream(requests, slots=8))
    assert sum(read) - once == sum(r.read_first for r in requests)
    assert tokens == apart


@pytest.mark.slow
@pytest.mark.parametrize(("name", "slots"), [("tiny-0", 1), ("grouped-0", 13), ("trained-0", 4), ("demo", 24)])
def test_300_rows_are_alone(name, slots):
    model = load(name)
    assert_as_alone(model, list(random_requests(model, 300, kinds=MORE, prompts=PROMPTS)), slots)


def engine(model, slots=8, capacity=64):
    sizes = {"slots": slots, "capacity": capacity, "block_size": 16}
    return Engine(model.towers, model.programs, model.params, kinds=Kinds(True, NAMES), **sizes)


def test_a_row_that_breaks():
    """A token whose embedding is not finite: its row ends with an error; others write what they do without it."""
    model = load("tiny-0")
    embeddings = model.params["context"]["tower"]["embeddings"].at[99].set(jnp.nan)
    tower = model.params["context"]["tower"] | {"embeddings": embeddings}
    params = model.params | {"context": model.params["context"] | {"tower": tower}}
    broken = tt.Model(model.config, params, model.towers)
    broken.programs = model.programs
    rng = np.random.default_rng(3)
    requests = [
        Request(i, [*rng.integers(4, 90, 6).tolist()], mode, max_new_tokens=int(rng.integers(1, 50)))
        for i, mode in enumerate(["diffusion", "ar", "mock-ar"] * 8)
    ]
    bad = [dataclasses.replace(r, prompt=[99, *r.prompt]) if i % 4 == 1 else r for i, r in enumerate(requests)]
    fine, _ = heard(model.stream(requests, slots=8))
    tokens, last = heard(broken.stream(bad, slots=8))
    for i, event in last.items():
        if i % 4 == 1:
            assert (event.end, tokens[i]) == ("error", [])
            assert event.error == "a logit was not finite; the row ends before it"
        elif 99 not in fine[i]:
            assert tokens[i] == fine[i]
            assert event.error is None
    assert sum(99 not in fine[i] for i in fine if i % 4 != 1) > 5


def test_one_compilation_serves_all():
    """Whatever the rows ask for, nothing is compiled after the first of each mode and each width of prompts."""
    model = load("tiny-0")

    def some(seed):
        checked = [r.checked(model.config.vocab_size, True) for r in random_requests(model, 30, seed)]
        return engine(model).run(checked)

    heard(some(0))
    compiled = model.programs.compile_seconds
    heard(some(1))
    assert model.programs.compile_seconds == compiled


@pytest.mark.slow
def test_a_soak():
    """20,000 short requests: memory is flat, and nothing is compiled after the first thousands."""
    model = load("tiny-0")
    rng, process, seen = np.random.default_rng(0), psutil.Process(), []

    def requests():
        for i in range(20_000):
            mode = ["diffusion", "ar", "mock-ar"][i % 3]
            prompt = rng.integers(4, 128, rng.integers(1, 20)).tolist()
            request = Request(i, prompt, mode, max_new_tokens=int(rng.integers(1, 24)), temperature=float(i % 2))
            yield request.checked(128, True)

    for ended, event in enumerate(e for e in engine(model, slots=16).run(requests()) if e.end):
        assert event.error is None
        if ended % 2_000 == 1_999:
            gc.collect()
            seen.append((process.memory_info().rss, model.programs.compile_seconds))
    assert len(seen) == 10
    memory, compiled = zip(*seen[1:], strict=True)
    assert len(set(compiled)) == 1
    assert max(memory) - memory[0] < 30e6, [m / 1e6 for m in memory]


def test_slots_are_used():
    """More than 90 % of the slots have a row in each round, as long as requests wait."""
    model = load("tiny-0")
    rng = np.random.default_rng(0)
    requests = [Request(i, [5, 6, 7], max_new_tokens=int(rng.integers(8, 64))) for i in range(100)]
    own = engine(model)
    checked = [r.checked(model.config.vocab_size, True) for r in requests]
    _, last = heard(own.run(checked))
    assert len(last) == 100
    assert 0.9 < own.use.share <= 1


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_cancelled(mode):
    """A row that is cancelled is heard of no more, and its slot serves others."""
    model = load("tiny-0")
    requests = [Request(i, [5 + i], mode, max_new_tokens=60).checked(128, True) for i in range(12)]
    whole, _ = heard(engine(model).run(requests))
    own = engine(model)
    tokens, ended = {}, {}
    for event in own.run(requests):
        assert event.key not in ended
        tokens.setdefault(event.key, []).extend(event.tokens)
        if event.end:
            ended[event.key] = event.end
        elif event.key % 3 == 0:
            assert own.cancel(event.key).end == ended.setdefault(event.key, "cancelled")
            assert own.cancel(event.key) is None
    assert {key for key, end in ended.items() if end == "cancelled"} == {0, 3, 6, 9}
    for key, row in whole.items():
        assert tokens[key] == (row[: len(tokens[key])] if key % 3 == 0 else row)


def test_logprobs():
    """Of greedy AR: the log of the softmax's largest value."""
    model = load("tiny-0")
    ((tokens, event),) = [(e.tokens, e) for e in model.stream([Request(0, [5, 6, 7], "ar", max_new_tokens=9)], slots=8)]
    logits = model.context_logits([5, 6, 7, *tokens[:-1]])[2:]
    np.testing.assert_allclose(event.logprobs, jax.nn.log_softmax(logits).max(-1), atol=1e-4)


def test_events_come_before_the_end():
    """Blocks come as they are written, while later requests are not even read."""
    model = load("tiny-0")
    taken = []

    def requests():
        for i in range(20):
            taken.append(i)
            yield Request(i, [5, 6], max_new_tokens=32).checked(128, True)

    first = next(iter(engine(model).run(requests())))
    assert first.end is None
    assert len(first.tokens) == 16
    assert len(taken) < 20


BAD = [
    ({"mode": "beam"}, "mode 'beam' does not exist; choose diffusion, ar, mock-ar, verified"),
    ({"prompt": [128]}, "prompt has id 128 at position 0; ids go from 0 to 127"),
    ({"prompt": []}, "prompt is empty"),
    ({"max_new_tokens": -1}, "max_new_tokens must be from 0"),
    ({"temperature": float("nan")}, "temperature must be a number"),
    ({"top_p": 0}, "top_p must be a number, above 0"),
    ({"eos_token_id": list(range(17))}, "eos_token_id has 17 ids; at most 16 can end a row"),
    ({"confidence_threshold": 2}, "confidence_threshold must be a number"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_requests(wrong, message):
    model = load("tiny-0")
    with pytest.raises(tt.InputError, match=message) as error:
        model.stream([Request("a", [5]), Request("b", **({"prompt": [5]} | wrong))])
    assert str(error.value).startswith("request 'b': ")


def test_bad_streams():
    model = load("tiny-0")
    with pytest.raises(tt.InputError, match="two requests have the same key"):
        model.stream([Request(1, [5]), Request(1, [6])])
    with pytest.raises(tt.InputError, match=r"requests are tt\.Request, not \[5\]"):
        model.stream([[5]])
    with pytest.raises(tt.InputError, match="needs a denoiser, and this model is a backbone"):
        load("backbone-0").stream([Request(0, [5])])
    assert list(model.stream([])) == []
    (event,) = model.stream([Request(0, [5], max_new_tokens=0)])
    assert (event.tokens, event.end) == ([], "length")


@pytest.mark.slow
def test_a_backbone():
    model = load("backbone-0")
    requests = [Request(i, [5, 6 + i], "ar", max_new_tokens=20) for i in range(5)]
    tokens, _ = heard(model.stream(requests, slots=2))
    assert [tokens[i] for i in range(5)] == [model.generate_ar([r.prompt], 20).tokens[0] for r in requests]


def test_what_does_not_fit():
    model = load("tiny-0")
    options = {"longest": 1000, "block_size": 16}
    towers, dtype = model.towers, jnp.dtype(jnp.float32)
    slots, capacity, line = sizes.plan(towers, dtype, room=10**8, **options)
    assert capacity >= 1000
    assert sizes.rows_bytes(towers.context, slots, capacity, 16, dtype) <= 10**8
    assert line.startswith(f"{slots} slots: ")
    with pytest.raises(tt.InputError, match=r"not one row fits: .* GB a row of 1024 positions, 1e-05 GB"):
        sizes.plan(towers, dtype, room=10**4, **options)
    with pytest.raises(tt.InputError, match="100000 slots do not fit"):
        sizes.plan(towers, dtype, room=10**8, slots=100_000, **options)
    assert sizes.plan(towers, dtype, waiting=2, **options)[0] == 2

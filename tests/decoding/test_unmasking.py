"""The rules against plain-loop statements of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import twotower_jax as tt
from twotower_jax.decoding.block import masked_block
from twotower_jax.decoding.unmasking import (
    CREDIT_DECAY,
    CREDIT_POWER,
    CREDIT_WEIGHT,
    NAMES,
    RULES,
    Choice,
    Seen,
    Unmasking,
    chosen,
)
from twotower_jax.decoding.vocabulary import ONE_DEVICE

ROWS, SIZE, VOCAB = 60, 12, 7


def softmax(logits):
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def case(seed):
    """Logits with equal positions, blocks with any number of masks, steps and predictions."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (ROWS, SIZE, VOCAB)).astype(np.float32)
    logits = np.take_along_axis(logits, rng.integers(0, SIZE, (ROWS, SIZE, 1)), axis=1)
    masked = rng.random((ROWS, SIZE)) < rng.random((ROWS, 1))
    block = masked_block(np.ones(ROWS, bool), rng.integers(4, SIZE + 1, ROWS), SIZE, 0)
    block = block.replace(
        masked=jnp.asarray(masked) & block.real,
        tokens=rng.integers(0, VOCAB, (ROWS, SIZE)),
        step=rng.integers(0, 5, ROWS).astype(np.int32),
    )
    predicted = np.where(rng.random((ROWS, 1)) < 0.5, logits.argmax(-1), rng.integers(0, VOCAB, (ROWS, SIZE)))
    return logits, predicted, block


@jax.jit
def choose(unmasking, logits, predicted, block):
    return unmasking.choose(Seen(logits, predicted, block.masked), block)


def wanted(rule, places, probability, predicted, bound):
    """Certainty by place, and how many of the most certain a rule would commit."""
    confidence = {i: probability[i, predicted[i]] if rule == "threshold" else probability[i].max() for i in places}
    if rule in ("threshold", "remask", "credit"):
        return confidence, sum(c > bound for c in confidence.values())
    if rule == "margin":
        apart = {i: np.subtract(*np.sort(probability[i])[:-3:-1]) for i in places}
        return apart, sum(m > bound for m in apart.values())
    if rule == "factor":
        ordered = sorted(confidence.values(), reverse=True)
        return confidence, max([n for n in range(1, len(places) + 1) if (n + 1) * (1 - ordered[n - 1]) < bound] + [0])
    entropy = {i: -sum(p * math.log(p) for p in probability[i] if p > 0) for i in places}
    ordered = sorted(entropy.values())
    fits = [n for n in range(1, len(places) + 1) if sum(ordered[:n]) - max(ordered[:n]) <= bound]
    return {i: -entropy[i] for i in places}, max([*fits, 0])


def plain(rule, probability, predicted, tokens, masked, size, step, steps, bound, doubt):
    """The places of one row to commit, and those to mask again."""
    places = [i for i in range(size) if masked[i]]
    certainty, count = wanted(rule, places, probability, predicted, bound)
    count = len(places) if step >= steps - 1 else max(count, 1, math.ceil(len(places) / (steps - step)))
    commit = sorted(places, key=lambda i: (-certainty[i], i))[:count]
    if rule != "remask" or step >= steps - 1:
        return sorted(commit), []
    likely = {i: probability[i, tokens[i]] for i in range(size) if not masked[i]}
    doubted = sorted((i for i in likely if likely[i] < doubt), key=lambda i: (likely[i], i))
    return sorted(commit), sorted(doubted[: max(len(commit) - 1, 0)])


@pytest.mark.parametrize("steps", [5, 16])
@pytest.mark.parametrize("rule", NAMES)
def test_equals_plain_loop(rule, steps):
    """Rows with any bounds of a rule, beside rows of the others."""
    logits, predicted, block = case(steps)
    rng = np.random.default_rng(9)
    bounds = rng.choice([0.0, 0.3, 0.62, 0.9, 1.0, 2.5], ROWS).astype(np.float32)
    rules = np.where(np.arange(ROWS) % 4 == 3, rng.integers(0, len(NAMES), ROWS), NAMES.index(rule))
    doubts = np.where(rules == NAMES.index("remask"), rng.choice([0.1, 0.3, 0.7], ROWS), 0).astype(np.float32)
    unmasking = Unmasking(bounds, steps, rules, doubts, NAMES)
    commit, doubted = choose(unmasking, logits, predicted, block)
    for row in range(ROWS):
        args = softmax(logits[row].astype(np.float64)), predicted[row], np.asarray(block.tokens)[row]
        masked, size, step = np.asarray(block.masked)[row], int(block.size[row]), int(block.step[row])
        own = NAMES[rules[row]]
        expected = plain(own, *args, masked, size, step, steps, float(bounds[row]), float(doubts[row]))
        found = np.flatnonzero(commit[row]).tolist(), np.flatnonzero(doubted[row]).tolist()
        assert found == expected, (row, own)


def test_every_pass_gets_on():
    """Also where all is doubted: a block is full after as many passes as it has positions."""
    logits, predicted, block = case(1)
    unmasking = Unmasking(np.float32(0), 99, NAMES.index("remask"), np.float32(1), ("remask",))
    commit, doubted = choose(unmasking, logits, predicted, block)
    got_on = np.asarray(commit.sum(1) - doubted.sum(1))
    assert (got_on[block.masked.any(1)] >= 1).all()
    assert doubted.any()


def test_credit_equals_plain_loop():
    """Over five passes, with tokens that come back."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (5, ROWS, SIZE, VOCAB)).astype(np.float32)
    unmasking = Unmasking(np.float32(0.8), 16, NAMES.index("credit"), rules=NAMES)
    weigh, masked = jax.jit(lambda *args: args[0].weigh(*args[1:], ONE_DEVICE)), np.ones((ROWS, SIZE), bool)
    history = masked_block(np.ones(ROWS, bool), np.full(ROWS, SIZE), SIZE, 0).history
    credit = np.zeros((ROWS, SIZE, VOCAB))
    for step, own in enumerate(logits):
        probability = softmax(own)
        credit *= CREDIT_DECAY
        for row in range(ROWS):
            for i in range(SIZE):
                token = own[row, i].argmax()
                credit[row, i, token] += probability[row, i, token] ** CREDIT_POWER
        at = np.full(ROWS, step, np.int32)
        history = history.add(at, own.argmax(-1), probability.max(-1), masked)
        found = weigh(unmasking, own, history, at)
        np.testing.assert_allclose(found, own + CREDIT_WEIGHT * np.log1p(credit), atol=1e-4)


def test_written_rules():
    assert chosen("factor") == Choice("factor", RULES["factor"].bound, 0.0)
    assert chosen("entropy=0.25") == Choice("entropy", 0.25, 0.0)
    assert chosen("remask=0.5,0.2") == Choice("remask", 0.5, 0.2)
    assert chosen("remask=0.5") == Choice("remask", 0.5, RULES["remask"].doubt)
    for wrong, message in [
        ("best", "unmasking 'best' does not exist; choose threshold, factor"),
        (None, "does not exist"),
        ("factor=", "takes NAME=NUMBER such as factor=1"),
        ("factor=x", "takes NAME=NUMBER such as factor=1"),
        ("margin=0.1,0.2", "margin takes one number at most"),
        ("margin=2", "unmasking margin must be a number, 0 or more and at most 1"),
        ("remask=0.5,nan", "second number must be"),
    ]:
        with pytest.raises(tt.InputError, match=message):
            chosen(wrong)

"""Scores: what logits say, whoever is beside a pair, each beginning read once; the bound, where it can be summed up."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DATA, byte_ids, load, write_broken_model

import twotower_jax as tt
from twotower_jax import cli, two_tower
from twotower_jax.scoring.bound import Bound, estimate
from twotower_jax.scoring.lines import Reader
from twotower_jax.scoring.pieces import WIDTH, Order, Tree
from twotower_jax.state import empty_state


def some_pairs(vocab_size, count=7, preamble=70, seed=0):
    """Ragged, some with a preamble, some with several continuations."""
    rng = np.random.default_rng(seed)

    def draw(low, high):
        return rng.integers(0, vocab_size, rng.integers(low, high)).tolist()

    shared, pairs = draw(preamble, preamble + 1), []
    for i in range(count):
        context = (shared if i % 2 else []) + draw(1, 60)
        pairs += [(context, draw(1, 50)) for _ in range(1 + i % 3)]
    return [*pairs, (shared[:1], shared[1:])]


def by_logits(model, context, continuation):
    """Each token's log-probability, and whether all are the most probable, in float64."""
    ids = [*context, *continuation]
    padded = ids + [0] * (-len(ids) % 320)  # one program for all lengths; what follows changes nothing
    logits = model.context_logits(padded)[len(context) - 1 : len(ids) - 1].astype(np.float64)
    each = logits[np.arange(len(continuation)), continuation] - np.logaddexp.reduce(logits, axis=-1)
    return each, (logits.argmax(-1) == continuation).all()


@pytest.mark.parametrize("name", ["tiny-0", pytest.param("grouped-0", marks=pytest.mark.slow)])
def test_equals_logits(name):
    model = load(name)
    pairs = some_pairs(model.config.vocab_size)
    scores = model.score(pairs, per_token=True)
    for i, pair in enumerate(pairs):
        each, greedy = by_logits(model, *pair)
        np.testing.assert_allclose(scores.per_token[i], each, atol=1e-4)
        assert scores.logprobs[i] == math.fsum(scores.per_token[i])
        assert scores.greedy[i] == greedy
    assert scores.errors == [None] * len(pairs)
    assert scores.standard_errors is None


@pytest.mark.slow
def test_right_answers(task_prompts):
    """Of a trained model: AR's own tokens are greedy, and more probable than wrong answers."""
    model = load("trained-0")
    tasks = [(byte_ids(p["prompt"]), p["ar"]) for p in task_prompts[:8]]
    wrong = [(prompt, answer[::-1]) for prompt, answer in tasks]
    scores = model.score(tasks + wrong)
    assert scores.greedy[:8] == [True] * 8
    for right, other, pair in zip(scores.logprobs[:8], scores.logprobs[8:], tasks, strict=True):
        assert right > other
        np.testing.assert_allclose(right, by_logits(model, *pair)[0].sum(), atol=1e-4)


@pytest.mark.parametrize("by", ["context", "denoiser"])
def test_a_pair_is_alone(tiny, by):
    """To the last bit: in any order, without the others, and beside a text that needs more room."""
    model, pairs = tiny.model, some_pairs(tiny.model.config.vocab_size)
    options = {"by": by, "samples": 3, "per_token": True}
    scores = model.score(pairs, **options)
    order = np.random.default_rng(1).permutation(len(pairs))
    mixed = model.score([pairs[i] for i in order], **options)
    assert [scores.per_token[i] for i in order] == mixed.per_token
    for i in (0, 2, len(pairs) - 1):
        alone = model.score([pairs[i]], **options)
        assert alone.per_token == [scores.per_token[i]]
        assert alone.standard_errors == (scores.standard_errors and [scores.standard_errors[i]])


@pytest.mark.slow
@pytest.mark.parametrize("by", ["context", "denoiser"])
def test_beside_a_long_text(tiny, by):
    """Which needs caches of another size."""
    pairs, long = some_pairs(128), (list(range(100)) * 3, [5, 6])
    options = {"by": by, "samples": 3, "per_token": True}
    beside = tiny.model.score([long, *pairs], **options)
    assert beside.per_token[1:] == tiny.model.score(pairs, **options).per_token
    assert beside.per_token[:1] == tiny.model.score([long], **options).per_token
    if by == "context":
        np.testing.assert_allclose(beside.per_token[0], by_logits(tiny.model, *long)[0], atol=1e-4)


def test_beginnings_are_read_once(tiny):
    rng = np.random.default_rng(0)
    preamble = rng.integers(0, 128, 3 * WIDTH).tolist()
    questions = [rng.integers(0, 128, WIDTH).tolist() for _ in range(5)]
    pairs = [(preamble + question, [a, b, 7]) for question in questions for a in (1, 2) for b in (3, 4)]
    scores = tiny.model.score(pairs)
    assert scores.tokens_read == 3 * WIDTH + 5 * (WIDTH + 2 * 2 * 2)  # all but the last token of a continuation
    # Of a context's tokens up to a multiple of WIDTH; answers of one token are all asked of it at once.
    letters = [(preamble + question + [9], [letter]) for question in questions for letter in range(4)]
    assert tiny.model.score(letters).tokens_read == 3 * WIDTH + 5 * (WIDTH + 1)
    assert tiny.model.score(letters[:1] * 3).tokens_read == 4 * WIDTH + 1


def test_more_continuations_than_a_pass_answers(tiny):
    """All tokens of the vocabulary, five times: their probabilities add up to one each time."""
    scores = tiny.model.score([([5, 6, 7], [token]) for token in range(128)] * 5)
    np.testing.assert_allclose(np.exp(scores.logprobs).reshape(5, 128).sum(1), 1, atol=1e-5)
    assert sum(scores.greedy) == 5
    assert scores.tokens_read == 2 * 3


@pytest.mark.parametrize(("rows", "together"), [(2, 1), (2, 4), (3, 2), (5, 8), (40, 16)])
def test_order_with_few_rows(rows, together):
    """Whatever is given up on the way, a piece is read after what comes before it; nothing is read twice if all fit."""
    rng = np.random.default_rng(rows)
    tree, asked = Tree(most=64), []
    for i in range(60):
        text = np.repeat(rng.integers(0, 2, 4), WIDTH)[: rng.integers(1, 4 * WIDTH)].astype(np.int32)
        for piece in tree.add(text):
            last = piece
        last.asked.append((0, 0, i))
        if i % 3 == 0:
            last.blocks.append(i)
        asked.append(text)
    order, held, found, again = Order(tree.first, rows), {}, {}, 0
    while capacity := order.capacity():
        taken = order.take(together, capacity, 64)
        assert 1 <= len(taken) <= together
        before = dict(held)
        for reading in taken:
            text = (() if reading.source is None else before[reading.source]) + tuple(reading.piece.tokens.tolist())
            if reading.target is not None:
                held[reading.target] = text
            again += reading.again
            for _, _, who in [] if reading.again else reading.piece.asked:
                assert who not in found
                found[who] = text
        assert len({r.target for r in taken if r.target is not None}) == sum(r.target is not None for r in taken)
        for reading in taken:
            for who in [] if reading.again else reading.piece.blocks:
                assert held[reading.piece.row] == tuple(asked[who].tolist())
                order.used(reading.piece)
    assert found == {i: tuple(text.tolist()) for i, text in enumerate(asked)}
    assert again == 0 or rows < 40
    assert again > 0 or rows > 3


def exact_bound(model, context, block):
    """Over all subsets of a block's positions: E_k E_subset n / k sum log p."""
    n, c, params = len(block), model.config, model.params
    masks = np.array(list(itertools.product([False, True], repeat=n))[1:])
    count, rows = masks.sum(1), len(masks)
    before, read = np.tile(np.int32([*context, 0, 0, 0])[:12], (rows, 1)), np.full(rows, len(context), np.int32)

    @jax.jit
    def denoised(params, before, read, noisy, t):
        _, state = two_tower.extend(c, params, empty_state(c, rows, 16, jnp.float32), before, read)
        return jax.nn.log_softmax(two_tower.denoise(c, params, state, noisy, t))

    found = denoised(params, before, read, np.where(masks, 3, np.int32(block)), np.float32(count / n))
    logprobs = np.asarray(found)[np.arange(rows)[:, None], np.arange(n), block]
    subsets = np.array([math.comb(n, k) for k in count])
    return ((logprobs * masks).sum(1) * n / count / subsets).sum() / n


def test_bound(tiny):
    """Blocks of three: the estimate is the sum over all masks, but for its error, which shrinks."""
    context, text = tiny.prompt(0).tolist()[:9], [50, 60, 70, 80, 90, 100]
    exact = exact_bound(tiny.model, context, text[:3]) + exact_bound(tiny.model, context + text[:3], text[3:])
    errors = []
    for samples in (8, 256):
        scores = tiny.model.score(
            [(context, text)], by="denoiser", block_size=3, samples=samples, seed=5, per_token=True
        )
        assert abs(scores.logprobs[0] - exact) < 4 * scores.standard_errors[0]
        assert scores.logprobs[0] == math.fsum(scores.per_token[0])
        errors.append(scores.standard_errors[0])
    assert errors[1] < errors[0] / 3
    assert scores.greedy is None


def test_masks():
    """Every number of positions as often as any other, every position as often as any other; none at random alone."""
    context = np.array([5, 6], np.int32)
    masks = Bound(6000, 3, 0).masks(context, 0, 6)
    np.testing.assert_array_equal(np.bincount(masks.sum(1), minlength=7), [0] + [1000] * 6)
    np.testing.assert_allclose(masks.mean(0), 3.5 / 6, atol=0.03)
    assert (Bound(6000, 3, 0).masks(context, 1, 6) != masks).any()
    assert (Bound(6000, 3, 1).masks(context, 0, 6) != masks).any()
    parts, variance = estimate(masks, np.full(masks.shape, -1.0))
    np.testing.assert_allclose(parts.sum(), -6)
    assert variance < 1e-12  # n / k of k ones is n, whatever the mask


def test_not_finite(tmp_path):
    """An error for the pair, never a number; others beside it, and after it in the same rows, are whole."""
    write_broken_model(tmp_path)
    model, whole = tt.load(tmp_path, dtype="float32"), load("tiny-0")
    pairs = [([5, 9], [6]), ([5, 6], [7, 8]), ([9] * 70, [1] * 40), ([6] * 70, [2] * 40), ([5], [6, 9])]
    for by in ("context", "denoiser"):
        scores, expected = (m.score(pairs, by=by, per_token=True) for m in (model, whole))
        assert scores.errors == ["a logit was not finite", None, "a logit was not finite", None, None]
        assert [x is None for x in scores.logprobs] == [True, False, True, False, False]
        for i in (1, 3):
            assert scores.per_token[i] == expected.per_token[i]
        assert scores.per_token[0] is None


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([([], [5])], {}, "pair 0's context is empty; it needs one token or more"),
        ([([5], [6]), ([5], [])], {}, "pair 1's continuation is empty"),
        ([([5], [999])], {}, "pair 0's continuation has id 999 at position 0; ids go from 0 to 127"),
        ([5], {}, "pair 0 must be .context ids, continuation ids., not 5"),
        ([([5], [6], [7])], {}, "pair 0 must be"),
        ("text", {}, "pairs must be a list of"),
        ([], {"by": "ar"}, "by must be context or denoiser, not 'ar'"),
        ([], {"samples": 1}, "samples must be from 2"),
        ([], {"block_size": 0}, "block_size must be from 1"),
        ([], {"seed": -1}, "seed must be from 0"),
        ([], {"mask_token_id": 128}, "mask_token_id must be from 0 to 127"),
    ],
)
def test_bad_input(tiny, pairs, options, message):
    with pytest.raises(tt.InputError, match=message):
        tiny.model.score(pairs, **options)


def test_backbone():
    model = load("backbone-0")
    with pytest.raises(tt.InputError, match="score by the denoiser needs a denoiser, and this model is a backbone"):
        model.score([([5], [6])], by="denoiser")


@pytest.mark.slow
def test_score_of_a_backbone():
    model, pair = load("backbone-0"), ([5, 6, 7], [8, 9])
    np.testing.assert_allclose(model.score([pair]).logprobs[0], by_logits(model, *pair)[0].sum(), atol=1e-4)


def test_no_pairs(tiny):
    assert tiny.model.score([]).logprobs == []


def test_too_long(tiny, monkeypatch):
    monkeypatch.setattr("twotower_jax.memory.free_bytes", lambda device: 2_000_000)
    with pytest.raises(tt.InputError, match=r"the longest text does not fit: .* GB of a device to use"):
        tiny.model.score([([5] * 20000, [6])])


@pytest.mark.slow
def test_little_memory(tiny, monkeypatch):
    """Fewer rows, and the same scores."""
    pairs = some_pairs(128)
    expected = tiny.model.score(pairs)
    monkeypatch.setattr("twotower_jax.memory.free_bytes", lambda device: 2_000_000)
    np.testing.assert_allclose(tiny.model.score(pairs).logprobs, expected.logprobs, atol=1e-3)


def run(capsys, *argv):
    status = cli.main(["score", *argv])
    out, err = capsys.readouterr()
    return status, [json.loads(line) for line in out.splitlines()], err


def test_command(capsys, tmp_path, task_prompts):
    """A line for each, in order, with errors in their places; and what all come to."""
    task, file = task_prompts[0], tmp_path / "lines.jsonl"
    answer = bytes(token - 4 for token in task["ar"]).decode()
    lines = [
        {"prompt": task["prompt"], "completion": answer, "id": "right"},
        {"text": task["prompt"] + answer},
        {"prompt": [5, 6], "completion": [7, 8]},
        {"text": "a"},
        {"prompt": "only"},
        {"prompt": "a", "completion": ""},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "nothing\n")
    trained = str(DATA / "trained-0")
    status, found, err = run(capsys, str(file), "--model", trained, "--dtype", "float32", "--per-token", "--json")
    assert status == 1
    assert [line["line"] for line in found] == list(range(1, 8))
    assert [line["error"].split(";")[0] for line in found[3:]] == [
        "text has one token, which is given",
        'it must have "text", or "prompt" and "completion"',
        "completion is empty",
        "it is not JSON: Expecting value at character 0",
    ]
    right, text, ids = found[:3]
    assert right["id"] == "right"
    assert right["greedy"]
    assert right["tokens"] == len(right["per_token"]) == len(task["ar"])
    assert text["tokens"] == len(task["prompt"] + answer) - 1
    np.testing.assert_allclose(text["per_token"][-len(task["ar"]) :], right["per_token"], atol=1e-4)
    assert ids["tokens"] == 2
    summary = json.loads(err.splitlines()[-1])
    total, tokens = sum(line["logprob"] for line in found[:3]), sum(line["tokens"] for line in found[:3])
    assert (summary["lines"], summary["errors"], summary["tokens"]) == (7, 4, tokens)
    np.testing.assert_allclose(summary["perplexity"], math.exp(-total / tokens))
    bits = -(right["logprob"] + text["logprob"]) / math.log(2)
    np.testing.assert_allclose(summary["bits_per_byte"], bits / (right["tokens"] + text["tokens"]))  # a byte a token


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"prompt": [5, 6], "completion": [7]}', None),
        (b'{"prompt": [5, 6], "completion": [7, 8]}', "its 4 tokens are too many: 3 fit"),
        (b'{"text": [5]}', "text has one token, which is given; what is scored comes after it"),
        (b'{"text": []}', "text is empty; it needs one token or more"),
        (b'{"text": [5, 6], "prompt": [5]}', 'it must have "text", or "prompt" and "completion"'),
        (b'{"prompt": [5], "completion": 6}', "completion must be text or a list of token ids, not 6"),
        (b'{"prompt": [5], "completion": [200]}', "completion has id 200 at position 0; ids go from 0 to 127"),
        (b"[5, 6]", "it must be an object, not [5, 6]"),
        (b"", "it is empty"),
    ],
)
def test_lines(line, error):
    assert Reader(None, 128, longest=3).line(1, line).error == error


def test_command_refuses(capsys, tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text('{"prompt": [5], "completion": [6]}\n{"text": "a b"}\n')
    tiny, float32 = str(DATA / "tiny-0"), ("--dtype", "float32")
    for options, message in [
        (("--samples", "4"), "--samples is no option of --by context"),
        (("--by", "denoiser", "--samples", "1"), "samples must be from 2"),
    ]:
        status, lines, err = run(capsys, str(file), "--model", tiny, *options)
        assert (status, lines) == (2, [])
        assert message in err
    status, _, err = run(capsys, str(tmp_path / "none"), "--model", tiny)
    assert status == 2
    assert "cannot read" in err
    status, lines, _ = run(capsys, str(file), "--model", tiny, "--by", "denoiser", "--samples", "2", *float32)
    assert status == 1
    assert lines[0]["standard_error"] == 0  # a block of one token has one mask
    assert "the model has no tokenizer.json" in lines[1]["error"]

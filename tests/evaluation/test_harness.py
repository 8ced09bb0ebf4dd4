"""The adapter: what lm-evaluation-harness finds is what a direct computation gives."""

import json

import jax
import numpy as np
import pytest
from conftest import DATA, load

import twotower_jax as tt
from twotower_jax.sources import locate
from twotower_jax.tokenizer import load_tokenizer

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from twotower_jax.evaluation.harness import TwoTowerLM  # noqa: E402

TOKENIZER = load_tokenizer(locate("demo"))
EOS, BOS, ROWS = 14, 1, 4
MODES = {"diffusion": "mask_diffusion", "ar": "ar", "mock-ar": "mock_ar", "verified": "verified"}


def adapter(**options):
    """With as many slots in all tests as direct calls have, so that few programs are compiled."""
    return TwoTowerLM(load("demo"), TOKENIZER, prefix_token_id=BOS, slots=ROWS, **options)


def evaluate(lm, monkeypatch, task, **options):
    monkeypatch.chdir(DATA.parents[1])  # which the task's paths are from
    manager = TaskManager(include_path=str(DATA / "tasks"), include_defaults=False)
    found = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0, **options)
    return found["results"][task], found["samples"][task]


def requests(kind, *arguments):
    return [Instance(kind, {}, one if isinstance(one, tuple) else (one,), i) for i, one in enumerate(arguments)]


def documents(name):
    return [json.loads(line) for line in (DATA / "tasks" / f"{name}.jsonl").read_text().splitlines()]


def written(mode, prompts, new_tokens=32):
    """What the model's own call gives: tokens, forwards and texts."""
    ids = [TOKENIZER.encode(prompt).ids if isinstance(prompt, str) else prompt for prompt in prompts]
    more = ids + ids[:1] * (ROWS - len(ids))
    g = getattr(load("demo"), f"generate_{MODES[mode]}")(more, max_new_tokens=new_tokens, eos_token_id=EOS)
    tokens = g.tokens[: len(ids)]
    return tokens, g.forwards[: len(ids)], [TOKENIZER.decode(row).partition("\n")[0] for row in tokens]


def log_likelihood(context, continuation):
    """By the context tower's logits over the whole sequence."""
    logits = load("demo").context_logits([*context, *continuation])[len(context) - 1 : -1]
    chosen = jax.nn.log_softmax(logits)[np.arange(len(continuation)), continuation]
    return float(chosen.sum()), logits.argmax(1).tolist() == list(continuation)


@pytest.mark.parametrize("mode", MODES)
def test_generation_task(monkeypatch, mode):
    lm = adapter(mode=mode)
    found, samples = evaluate(lm, monkeypatch, "demo_words", limit=ROWS)
    docs = documents("words")[:ROWS]
    tokens, forwards, texts = written(mode, [doc["question"] for doc in docs])
    assert [s["resps"][0][0] for s in samples] == texts
    right = np.mean([text.strip() == doc["answer"] for text, doc in zip(texts, docs, strict=True)])
    assert found["exact_match,line"] == right
    assert (right == 0) == (mode == "mock-ar")
    assert lm.tally.tokens == sum(map(len, tokens))
    assert lm.tally.tokens_per_forward(mode) == sum(map(len, tokens)) / sum(forwards)


def test_few_shots(monkeypatch):
    """Examples stand before every question; verified decoding writes what ar does."""
    lm = adapter(mode="ar")
    _, samples = evaluate(lm, monkeypatch, "demo_shots", limit=ROWS)
    (example, _), docs = documents("words-examples"), documents("words")[:ROWS]
    prompts = [f"{example['question']} {example['answer']}\n{doc['question']}" for doc in docs]
    assert [s["arguments"][0][0] for s in samples] == prompts
    assert [s["resps"][0][0] for s in samples] == written("ar", prompts)[2] == written("verified", prompts)[2]


def test_multiple_choice_task(monkeypatch):
    found, samples = evaluate(adapter(), monkeypatch, "demo_initials", limit=6)
    right = []
    for doc, sample in zip(documents("initials")[:6], samples, strict=True):
        context = TOKENIZER.encode(doc["question"]).ids
        pairs = [(context, TOKENIZER.encode(f" {choice}").ids) for choice in doc["choices"]]
        direct = [log_likelihood(*pair) for pair in pairs]
        for (value, greedy), ((given, same),) in zip(direct, sample["resps"], strict=True):
            assert given == pytest.approx(value, abs=2e-3)
            assert same == greedy
        right.append(int(np.argmax([value for value, _ in direct])) == doc["answer"])
    assert found["acc,none"] == np.mean(right) == 1


def test_the_denoisers_bound():
    lm = adapter(likelihood="denoiser", samples=4, seed=5, block_size=8)
    asked = [("first knot quail =", " k q\n"), ("first knot quail =", " g q\n")]
    pairs = [(TOKENIZER.encode(a).ids, TOKENIZER.encode(b).ids) for a, b in asked]
    scores = load("demo").score(pairs, by="denoiser", samples=4, seed=5, block_size=8)
    assert lm.loglikelihood(requests("loglikelihood", *asked)) == [(value, False) for value in scores.logprobs]
    assert scores.logprobs[0] > scores.logprobs[1]


def test_empty_context_and_trailing_space():
    """Without context a text stands after the prefix; a space at the context's end is the continuation's."""
    found = adapter().loglikelihood(requests("loglikelihood", ("", "spell"), ("spell heart = ", "h e")))
    after_prefix = log_likelihood([BOS], TOKENIZER.encode("spell").ids)
    moved = log_likelihood(TOKENIZER.encode("spell heart =").ids, TOKENIZER.encode(" h e").ids)
    np.testing.assert_allclose(np.array(found), np.array([after_prefix, moved]), atol=1e-3)


def test_what_is_too_long_loses_its_beginning():
    lm, context, continuation = adapter(mode="ar", max_length=8), "spell heart wood tiger =", " h e a r t, w"
    ids, end = TOKENIZER.encode(context).ids, TOKENIZER.encode(continuation).ids
    ((value, _),) = lm.loglikelihood(requests("loglikelihood", (context, continuation)))
    assert len(ids) + len(end) > 9
    assert value == pytest.approx(log_likelihood(ids[len(ids) + len(end) - 9 :], end)[0], abs=1e-3)
    (text,) = lm.generate_until(requests("generate_until", (context, {"max_gen_toks": 5})))
    assert text == written("ar", [ids[-3:]], 5)[2][0]
    with pytest.raises(tt.InputError, match="max_gen_toks 8 leaves no room for a prompt: max_length is 8"):
        lm.generate_until(requests("generate_until", (context, {"max_gen_toks": 8})))


def test_rolling():
    """Windows of the greatest length, in which every token counts once; the first begins with the prefix."""
    text = "copy heart wood tiger = heart wood"
    ids = TOKENIZER.encode(text).ids
    (whole,) = adapter().loglikelihood_rolling(requests("loglikelihood_rolling", text))
    assert whole == pytest.approx(log_likelihood([BOS], ids)[0], abs=1e-3)
    (parts,) = adapter(max_length=4).loglikelihood_rolling(requests("loglikelihood_rolling", text))
    all_ids = [BOS, *ids]
    windows = [(all_ids[i : i + 1], all_ids[i + 1 : i + 5]) for i in range(0, len(ids) - 3, 4)]
    if rest := len(ids) % 4:  # the last window is as long as the others
        windows.append((all_ids[-5:-rest], all_ids[-rest:]))
    assert parts == pytest.approx(sum(log_likelihood(*window)[0] for window in windows), abs=2e-3)


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_stop_strings(mode):
    """The text ends before the first of them; what counts are the tokens that hold it."""
    prompt, lm = "spell heart wood tiger =", adapter(mode=mode)
    (text,) = lm.generate_until(requests("generate_until", (prompt, {"until": [" d", ", w"], "max_gen_toks": 32})))
    whole = written(mode, [prompt])[0][0]
    assert text == TOKENIZER.decode(whole).partition(", w")[0] == " h e a r t"
    assert ", w" in TOKENIZER.decode(whole[: lm.tally.tokens])
    assert ", w" not in TOKENIZER.decode(whole[: lm.tally.tokens - 1])
    assert mode == "diffusion" or lm.tally.context_forwards == lm.tally.tokens


def test_sampling():
    """A repeat of a prompt draws anew; what a prompt draws does not depend on the others."""
    options = {"do_sample": True, "temperature": 3.0, "top_p": 0.9, "max_gen_toks": 12, "until": "\n"}
    asked = [("copy heart wood =", options), ("sort wood =", options), ("copy heart wood =", options)]
    one, other, again = adapter(mode="ar").generate_until(requests("generate_until", *asked))
    assert one != again
    assert adapter(mode="ar").generate_until(requests("generate_until", asked[1])) == [other]
    cold = {"do_sample": False, "temperature": 3.0, "max_gen_toks": 12, "until": "\n"}  # which is greedy
    assert adapter(mode="ar").generate_until(requests("generate_until", ("copy heart wood =", cold))) == [" heart wood"]


def test_what_cannot_be_had_is_said():
    def says(text):
        return pytest.raises(tt.InputError, match=text)

    with says("num_beams 4 is not supported; known are until, max_gen_toks"):
        adapter().generate_until(requests("generate_until", ("a", {"num_beams": 4})))
    with says("mode 'fast' does not exist"):
        adapter(mode="fast")
    with says("threshold is no argument of the model twotower; known are pretrained"):
        adapter(threshold=0.5)
    with says("has no chat template"):
        adapter().apply_chat_template([{"role": "user", "content": "a"}])
    with says("likelihood 'both' does not exist; choose context or denoiser"):
        adapter(likelihood="both")
    with says("the continuation '' has 0 tokens"):
        adapter().loglikelihood(requests("loglikelihood", ("a", "")))
    with says("pretrained=MODEL"):
        TwoTowerLM.create_from_arg_string("mode=ar")


def test_arguments_of_the_harness():
    """What `lm_eval --model twotower --model_args` gives."""
    text = "pretrained=demo,mode=verified,dtype=float32,context_devices=0,denoiser_devices=0,slots=4"
    lm = lm_eval.api.registry.get_model("twotower").create_from_arg_string(text, {"batch_size": 1, "device": None})
    assert (lm.mode, lm.prefix_token_id, lm.eot_token_id, lm.tokenizer_name) == ("verified", BOS, EOS, "demo")
    assert lm.generate_until(requests("generate_until", ("copy heart wood =", {"max_gen_toks": 8}))) == [" heart wood"]


def test_cached_answers(tmp_path):
    """The harness finds answers under the requests' own arguments, and does not ask again."""
    asked = requests("generate_until", ("copy heart wood =", {"until": ["\n"], "max_gen_toks": 8}))
    lm = adapter(mode="ar")
    cached = lm_eval.api.model.CachingLM(lm, str(tmp_path / "cache"))
    assert cached.generate_until(asked) == [" heart wood"]
    written_once = lm.tally.tokens
    assert cached.generate_until(asked) == [" heart wood"]
    assert lm.tally.tokens == written_once > 0

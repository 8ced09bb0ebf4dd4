"""The shipped model's tasks: every answer is right, and what is held out is not trained on."""

import itertools
import json
import re

from experiments.demo import tasks


def answer(name: str, given: str) -> str:
    """By other means than the task's own."""
    if name == "lookup":
        pairs, keys = given.split("; ")
        return " and ".join(re.search(rf"(?:^|, )({key} is \w+)", pairs)[1] for key in keys.split(" and "))
    if name == "count":
        low, high = map(int, given.split(" to "))
        return " ".join(map(str, range(low, high + 1)))
    if name == "add":
        one, two = map(int, given.split())
        carry = one % 10 + two % 10 >= 10
        high = (one + two) // 10
        working = f"{one % 10}+{two % 10}={one % 10 + two % 10}, {one // 10}+{two // 10}{'+1' * carry}={high}"
        return f"{working}, {one + two}"
    words = given.split(" ")
    order = sorted(range(len(words)), key=lambda i: words[i])
    return {
        "copy": given,
        "reverse": " ".join(words[-1 - i] for i in range(len(words))),
        "sort": " ".join(words[i] for i in order),
        "upper": given.swapcase(),
        "twice": f"{given} {given}",
        "first": "".join(re.findall(r"\b\w|\s", given)),
        "spell": re.sub(r"(\w)(?=\w)", r"\1 ", given.replace(" ", ", ")),
    }[name]


def test_answers():
    names = set()
    for example in itertools.islice(tasks.examples(seed=5), 3000):
        name, given = re.fullmatch(r"(\w+) (.*) =", example["prompt"]).groups()
        assert example["completion"] == f" {answer(name, given)}\n"
        assert example["task"] == name
        names.add(name)
    assert names == set(tasks.TASKS)


def test_held_out(tmp_path):
    tasks.write(tmp_path, train=5000, test=200)
    train, test = (tasks.read(tmp_path / f"{name}.jsonl") for name in ("train", "test"))
    prompts = {example["prompt"] for example in test}
    assert (len(train), len(prompts)) == (5000, 200)
    assert not prompts & {example["prompt"] for example in train}
    samples = json.loads((tmp_path / "samples.json").read_text())
    assert len(samples) == len(tasks.TASKS)
    assert {sample["prompt"] for sample in samples} <= prompts


def test_tokenizer():
    """Bytes are the ids `byte + 4`; words are one token; an example's end is EOS, and text comes back as it was."""
    tokenizer = tasks.tokenizer()
    assert [tokenizer.token_to_id(name) for name in tasks.SPECIAL] == [0, 1, 2, 3]
    assert tokenizer.encode("\n~\0").ids == [14, 130, 4]
    assert all(len(tokenizer.encode(f" {word} {word.upper()}").ids) == 2 for word in tasks.WORDS)
    for example in itertools.islice(tasks.examples(seed=6), 300):
        prompt, completion = tokenizer.encode(example["prompt"]).ids, tokenizer.encode(example["completion"]).ids
        assert completion.index(14) == len(completion) - 1
        assert tokenizer.encode(example["prompt"] + example["completion"]).ids == prompt + completion
        assert tokenizer.decode(prompt + completion) == example["prompt"] + example["completion"]

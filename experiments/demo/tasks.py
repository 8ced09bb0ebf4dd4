"""One-line tasks with exact answers: what the shipped model is trained on and judged by; and its tokenizer.

    python -m experiments.demo.tasks OUT

writes OUT/train.jsonl and OUT/test.jsonl, lines of {"prompt", "completion", "task"}; OUT/samples.json, the first test
prompt of each task with its answer; and OUT/tokenizer.json. No test prompt is trained on.
"""

import json
import random
import string
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

WORDS = (Path(__file__).parent / "words.txt").read_text().split()
SPECIAL = ["<pad>", "<s>", "</s>", "<mask>"]


def words(rng: random.Random, low: int, high: int) -> list[str]:
    return rng.sample(WORDS, rng.randint(low, high))


def copy(rng):
    chosen = words(rng, 2, 10)
    return " ".join(chosen), " ".join(chosen)


def reverse(rng):
    chosen = words(rng, 2, 8)
    return " ".join(chosen), " ".join(chosen[::-1])


def sort(rng):
    chosen = words(rng, 2, 6)
    return " ".join(chosen), " ".join(sorted(chosen))


def upper(rng):
    chosen = words(rng, 2, 8)
    return " ".join(chosen), " ".join(chosen).upper()


def twice(rng):
    chosen = words(rng, 2, 6)
    return " ".join(chosen), " ".join(chosen * 2)


def first(rng):
    chosen = words(rng, 2, 8)
    return " ".join(chosen), " ".join(word[0] for word in chosen)


def spell(rng):
    chosen = words(rng, 2, 4)
    return " ".join(chosen), ", ".join(" ".join(word) for word in chosen)


def lookup(rng):
    """Two of the keys, so that the answer is a sentence."""
    keys, values = words(rng, 3, 6), words(rng, 6, 6)
    pairs = list(zip(keys, values, strict=False))
    asked = rng.sample(pairs, 2)
    given = ", ".join(f"{k} is {v}" for k, v in pairs)
    return f"{given}; {asked[0][0]} and {asked[1][0]}", " and ".join(f"{k} is {v}" for k, v in asked)


def count(rng):
    low, length = rng.randint(1, 80), rng.randint(3, 12)
    return f"{low} to {low + length}", " ".join(str(n) for n in range(low, low + length + 1))


def add(rng):
    """With the working written out, digit by digit from the right."""
    one, two = rng.randint(10, 99), rng.randint(10, 99)
    low = one % 10 + two % 10
    high = one // 10 + two // 10 + low // 10
    carry = "+1" if low > 9 else ""
    return f"{one} {two}", f"{one % 10}+{two % 10}={low}, {one // 10}+{two // 10}{carry}={high}, {one + two}"


TASKS = {task.__name__: task for task in (copy, reverse, sort, upper, twice, first, spell, lookup, count, add)}


def examples(seed: int):
    """Task after task, for ever."""
    rng = random.Random(seed)
    while True:
        name = rng.choice(list(TASKS))
        given, answer = TASKS[name](rng)
        yield {"prompt": f"{name} {given} =", "completion": f" {answer}\n", "task": name}


def tokenizer() -> Tokenizer:
    """Byte-level BPE in which a byte is the id `byte + 4`, every word is one token, and a digit stands alone."""
    splits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    learner = Tokenizer(BPE())
    learner.pre_tokenizer = splits
    texts = [f" {word} {word.upper()}" for word in [*WORDS, "is", "and", "to"]]
    texts += [f" {letter}" for letter in string.ascii_lowercase] + [" =", *TASKS]
    learner.train_from_iterator(texts * 2, BpeTrainer(vocab_size=10_000, min_frequency=2, show_progress=False))
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    alphabet = _byte_alphabet()
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *dict.fromkeys(map("".join, merges))])}
    made = Tokenizer(BPE(vocab, merges))
    made.pre_tokenizer, made.decoder = splits, decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return made


def _byte_alphabet() -> list[str]:
    """What stands for bytes 0 to 255 in byte-level BPE: printable characters for themselves, others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def write(out: Path, train: int = 400_000, test: int = 500) -> None:
    """Writes `train.jsonl`, `test.jsonl`, `samples.json` and `tokenizer.json`."""
    held_out: dict[str, dict] = {}
    for example in examples(seed=1):
        if len(held_out) == test:
            break
        held_out[example["prompt"]] = example
    lines, source = [], examples(seed=2)
    while len(lines) < train:
        if (example := next(source))["prompt"] not in held_out:
            lines.append(example)
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("test", held_out.values()), ("train", lines)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
    samples = {}
    for example in held_out.values():
        samples.setdefault(example["task"], {"prompt": example["prompt"], "answer": example["completion"].rstrip("\n")})
    (out / "samples.json").write_text(json.dumps(list(samples.values()), indent=1) + "\n")
    tokenizer().save(str(out / "tokenizer.json"))


def read(file: Path) -> list[dict]:
    """The examples of a file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


if __name__ == "__main__":
    write(Path(sys.argv[1]))

"""One-line tasks with exact answers: what the shipped model is trained on and judged by.

    python -m experiments.demo.tasks OUT

writes OUT/train.jsonl and OUT/test.jsonl, lines of {"prompt", "completion", "task"}. No test prompt is trained on.
"""

import json
import random
import sys
from pathlib import Path

WORDS = (Path(__file__).parent / "words.txt").read_text().split()


def words(rng: random.Random, low: int, high: int) -> list[str]:
    return rng.sample(WORDS, rng.randint(low, high))


def copy(rng):
    chosen = words(rng, 2, 6)
    return " ".join(chosen), " ".join(chosen)


def upper(rng):
    chosen = words(rng, 1, 4)
    return " ".join(chosen), " ".join(chosen).upper()


def join(rng):
    chosen = words(rng, 2, 5)
    return " ".join(chosen), "-".join(chosen)


def twice(rng):
    chosen = words(rng, 1, 3)
    return " ".join(chosen), " ".join(chosen * 2)


def swap(rng):
    one, two = words(rng, 2, 2)
    return f"{one} {two}", f"{two} {one}"


def first(rng):
    chosen = words(rng, 2, 6)
    return " ".join(chosen), " ".join(word[0] for word in chosen)


def spell(rng):
    (word,) = words(rng, 1, 1)
    return word, " ".join(word)


def lookup(rng):
    keys, values = words(rng, 3, 5), words(rng, 3, 5)
    pairs = list(zip(keys, values, strict=False))
    key, value = rng.choice(pairs)
    return ", ".join(f"{k} is {v}" for k, v in pairs) + f"; {key}", f"{key} is {value}"


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


TASKS = {task.__name__: task for task in (copy, upper, join, twice, swap, first, spell, lookup, count, add)}


def examples(seed: int):
    """Task after task, for ever."""
    rng = random.Random(seed)
    while True:
        name = rng.choice(list(TASKS))
        given, answer = TASKS[name](rng)
        yield {"prompt": f"{name} {given} =", "completion": f" {answer}\n", "task": name}


def write(out: Path, train: int = 400_000, test: int = 500) -> None:
    """Writes `train.jsonl` and `test.jsonl`."""
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


def read(file: Path) -> list[dict]:
    """The examples of a file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


if __name__ == "__main__":
    write(Path(sys.argv[1]))

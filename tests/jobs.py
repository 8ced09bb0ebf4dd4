"""Files of requests for tests."""

import json
import random

from conftest import DATA, load

from twotower_jax.engine import job
from twotower_jax.engine.lines import URL


def wrapped(i, body):
    return json.dumps({"custom_id": f"r{i}", "method": "POST", "url": URL, "body": body}).encode()


def good(i):
    """A line that asks for something short."""
    rng = random.Random(i)
    body = {"prompt": [rng.randrange(4, 128) for _ in range(rng.randrange(1, 9))], "max_tokens": rng.randrange(0, 20)}
    if i % 5 == 1:
        body |= {"mode": "ar", "temperature": 1.0, "top_p": 0.9}
    if i % 5 == 2:
        body |= {"mode": "mock-ar", "top_k": 5, "temperature": 0.7, "seed": i}
    if i % 5 == 3:
        body |= {"confidence_threshold": 0.1, "steps_per_block": 4, "block_size": 8, "user": "me", "n": 1}
    return wrapped(i, body)


def write(path, lines):
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def results(path):
    """What a file of results holds, by id; each id stands once."""
    found = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len({r["id"] for r in found}) == len(found)
    return {r["id"]: r for r in found}


def run(source, target, **options):
    name = str(DATA / "tiny-0")
    return job.run(load("tiny-0"), None, str(source), str(target), job.Options(slots=8, **options), name)

"""Traces made by hand."""

import random

from twotower_jax.trace.record import Block, Pass, Row, Trace

HOSTILE = ["</script><b>&\"'", "\n", " ", "\t", "\x00\x1b", "\u202e", "שלום", "é", "", "$data {x} `", "<!--", "\\u003c"]


def block(*commits, start=0, given=0, kept=None, correction=None):
    """A block whose position i holds token i + 1, written in pass `commits[i]`; None where it is given."""
    tokens = list(range(1, len(commits) + 1))
    passes = [
        Pass(tokens, [confidence(n, i) for i in range(len(commits))], [c is not None and c >= n for c in commits])
        for n in range(max((c for c in commits if c is not None), default=-1) + 1)
    ]
    return Block(start, passes, tokens, given, len(tokens) - given if kept is None else kept, correction)


def confidence(number, place):
    """Of every pass and position another."""
    return ((number * 37 + place * 11) % 100) / 100


def diffusion_row(*blocks, prompt=(50, 51), end="stop"):
    tokens = [token for b in blocks for token in b.tokens[: b.kept]]
    forwards = (sum(len(b.passes) for b in blocks), len(blocks))
    return Row(list(prompt), "diffusion", tokens, [0.5] * len(tokens), list(blocks), end, forwards)


def verified_row():
    """A block without drafts; one whose second is rejected; one whose drafts are right; one in which the row ends; and
    drafts of an earlier block.
    """
    blocks = [
        block(None, given=1, correction=39),
        block(None, 0, 1, 0, start=1, given=1, kept=1, correction=40),
        block(None, 0, 0, 1, start=3, given=1, correction=41),
        block(None, None, None, start=7, given=1, correction=42),
        block(None, 0, 0, 1, start=10, given=1, kept=2),
    ]
    tokens = [39, 2, 40, 2, 3, 4, 41, 2, 3, 42, 2, 3]
    return Row([50, 51], "verified", tokens, [0.5] * len(tokens), blocks, "stop", (6, 6))


def ar_row(count=5, mode="ar"):
    tokens = [i % 60 for i in range(count)]
    forwards = (count, count + 1) if mode == "mock-ar" else (0, count + 1)
    return Row([50, 51], mode, tokens, [i / count for i in range(count)], [], "length", forwards)


def trace(*rows, pieces=None):
    """Tokens below 100 have a text."""
    return Trace(list(rows), "made", {"temperature": 0}, {i: f" w{i}" for i in range(100)} | (pieces or {}))


def long_trace(tokens=2000, size=16, seed=0):
    """Blocks of random order."""
    of = random.Random(seed)
    blocks = [block(*(of.randrange(8) for _ in range(size)), start=at) for at in range(0, tokens, size)]
    return trace(diffusion_row(*blocks))

"""Requests of every kind, and what is heard of them."""

import numpy as np

from twotower_jax.engine.request import Request

SHORT, PROMPTS, OUTPUTS = (1, 2, 7, 16), (1, 2, 7, 16, 40, 100), (1, 5, 16, 33, 48)
RULES = [
    "threshold=0.2",
    "threshold",
    "threshold=0.95",
    "factor=0.5",
    "entropy=1",
    "margin=0.3",
    "credit=0.5",
    "remask",
    "remask=0.3,0.9",
]
KINDS = [("diffusion", 16, True), ("diffusion", 5, False), ("ar", 1, True), ("mock-ar", 1, False)]
MORE = [*KINDS, ("diffusion", 16, False), ("diffusion", 5, True), ("ar", 1, False), ("mock-ar", 1, True)]


def random_requests(model, count, seed=0, kinds=KINDS, prompts=SHORT, rules=RULES):
    """Of all lengths, rules, steps, samplers and seeds, in random order; a kind is mode, block, whether drawn."""
    rng = np.random.default_rng(seed)
    vocab = model.config.vocab_size
    for i in rng.permutation(count).tolist():
        mode, block, drawn = kinds[rng.integers(len(kinds))]
        yield Request(
            key=i,
            prompt=rng.integers(4, vocab, rng.choice(prompts)).tolist(),
            mode=mode,
            max_new_tokens=int(rng.choice(OUTPUTS)),
            block_size=block,
            steps_per_block=int(rng.integers(1, 17)),
            unmasking=str(rng.choice(rules)),
            draft_passes=rng.choice([None, 1, 2, 4]),
            temperature=float(rng.choice([0.5, 1.5])) if drawn else 0.0,
            top_k=int(rng.integers(2, 30)) if drawn and rng.random() < 0.5 else None,
            top_p=0.9 if drawn and mode != "diffusion" and rng.random() < 0.5 else None,
            eos_token_id=rng.integers(4, vocab, rng.integers(0, 3)).tolist(),
            seed=int(rng.integers(0, 2**32)),
            row=int(rng.integers(0, 5)),
        )


def heard(events):
    """Each key's tokens, and its last event."""
    tokens, last = {}, {}
    for event in events:
        assert event.key not in last, "an event after the end"
        assert len(event.tokens) == len(event.logprobs)
        tokens.setdefault(event.key, []).extend(event.tokens)
        if event.end:
            last[event.key] = event
    return tokens, last

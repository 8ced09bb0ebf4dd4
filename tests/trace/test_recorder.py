"""What is recorded is what was decoded."""

import pytest
from conftest import load

from twotower_jax.engine.request import counted
from twotower_jax.trace.recorder import Recorder

PROMPTS = [[40, 36, 7], [9], [20, 21, 22, 23]]
RUNS = {
    "diffusion": {"unmasking": "remask=0.5,0.9", "temperature": 1.0},
    "verified": {"draft_passes": 3},
    "ar": {},
}


@pytest.mark.parametrize("mode", RUNS)
def test_passes_make_the_text(mode):
    """Every pass commits what stands in the block in the end, and blocks make the text."""
    model, recorder = load("demo"), Recorder(mode, PROMPTS)
    asked = {"max_new_tokens": 24, "eos_token_id": model.config.eos_token_ids} | RUNS[mode]
    g = model.generate(mode, PROMPTS, watch=recorder, **asked)
    trace = recorder.trace("demo", {}, str)
    for row, prompt, tokens, passes in zip(trace.rows, PROMPTS, g.tokens, g.forwards, strict=True):
        assert (row.prompt, row.tokens, len(row.probabilities)) == (prompt, tokens, len(tokens))
        assert counted(mode, *row.forwards) == passes
        assert sum(len(block.passes) for block in row.blocks) == row.forwards[0]
        written = []
        for block in row.blocks:
            assert block.start == len(written)
            assert not block.passes or all(block.passes[0].masked[block.given :])
            for i, token in enumerate(block.tokens):
                committed = [n for n, step in enumerate(block.passes) if step.masked[i]]
                assert not committed or block.passes[committed[-1]].predicted[i] == token
            written += block.tokens[block.given : block.given + block.kept]
            written += [] if block.correction is None else [block.correction]
        assert written == (tokens if row.blocks else [])
        assert {*prompt, *tokens} <= {*trace.pieces}

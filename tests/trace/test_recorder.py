"""What is recorded is what was decoded: every pass can be made again from what it shows."""

import pytest
from conftest import load

from twotower_jax.engine.request import counted
from twotower_jax.trace.recorder import Recorder

PROMPTS = [[40, 36, 7], [9], [20, 21, 22, 23]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["diffusion", "verified", "ar"])
def test_passes_make_the_text(mode, temperature):
    model = load("demo")
    recorder = Recorder(mode, PROMPTS)
    g = model.generate(
        mode,
        PROMPTS,
        max_new_tokens=24,
        eos_token_id=model.config.eos_token_ids,
        temperature=temperature,
        watch=recorder,
    )
    trace = recorder.trace("demo", {}, str)
    for row, prompt, tokens, passes in zip(trace.rows, PROMPTS, g.tokens, g.forwards, strict=True):
        assert (row.prompt, row.tokens, len(row.probabilities)) == (prompt, tokens, len(tokens))
        assert sum(len(block.passes) for block in row.blocks) == (0 if mode == "ar" else row.forwards[0])
        assert counted(mode, *row.forwards) == passes
        written = []
        for block in row.blocks:
            assert block.start == len(written)
            for step, after in zip(block.passes, [p.masked for p in block.passes[1:]] + [[False] * 16], strict=False):
                for i, masked in enumerate(step.masked):
                    if masked and not after[i]:
                        assert step.predicted[i] == block.tokens[i]
            written += block.tokens[block.given : block.given + block.kept]
            written += [] if block.correction is None else [block.correction]
        assert written == (tokens if row.blocks else [])
        assert {*prompt, *tokens} <= {*trace.pieces}


def test_the_first_pass_is_the_denoisers():
    """All is masked before it, and the most probable tokens of the first pass are those of any other rule."""
    model = load("demo")
    first = []
    for rule in ("threshold=0.9", "remask"):
        recorder = Recorder("diffusion", PROMPTS)
        model.generate("diffusion", PROMPTS, max_new_tokens=16, unmasking=rule, watch=recorder)
        passes = [row.blocks[0].passes[0] for row in recorder.trace("demo", {}, str).rows]
        assert all(all(p.masked) for p in passes)
        first.append([p.predicted for p in passes])
    assert first[0] == first[1]

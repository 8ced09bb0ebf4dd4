"""A tour of the decoding modes: the same prompts in each, on the shipped model."""

import json
from typing import Any

import twotower_jax as tt
from twotower_jax import sources
from twotower_jax.tokenizer import load_tokenizer

MODEL = "demo"
MODES = {
    "ar": "the context tower, token by token",
    "diffusion": "the denoiser, blocks of 16, committing what it is surer of than 0.8",
    "diffusion, 4 steps": "the same in 4 passes a block at most",
    "verified": "what ar writes, in blocks that the denoiser drafts and the context tower verifies",
    "mock-ar": "the denoiser, token by token: a diagnostic of its training",
}
NEW_TOKENS = 64


def tour(placement: tt.Placement | None = None) -> dict[str, Any]:
    """Generates the answers to the shipped model's sample prompts.

    Args:
      placement: the model's devices.

    Returns:
      "model", "seconds" and "compile_seconds" of all modes, and "modes": for each its "about", "exact_match",
      "tokens_per_forward" and "rows" of {"prompt", "text", "right"}.
    """
    folder = sources.locate(MODEL)
    model, tokenizer = tt.load(MODEL, placement=placement), load_tokenizer(folder)
    samples = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
    prompts = [tokenizer.encode(sample["prompt"], add_special_tokens=False).ids for sample in samples]
    eos = model.config.eos_token_ids
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": eos}
    runs = {
        "ar": model.generate_ar(prompts, **options),
        "diffusion": model.generate_mask_diffusion(prompts, **options),
        "diffusion, 4 steps": model.generate_mask_diffusion(prompts, steps_per_block=4, **options),
        "verified": model.generate_verified(prompts, **options),
        "mock-ar": model.generate_mock_ar(prompts, **options),
    }
    modes = {}
    for name, g in runs.items():
        texts = [tokenizer.decode([token for token in row if token not in eos]) for row in g.tokens]
        rows = [
            {"prompt": sample["prompt"], "text": text, "right": text == sample["answer"]}
            for sample, text in zip(samples, texts, strict=True)
        ]
        modes[name] = {
            "about": MODES[name],
            "exact_match": sum(row["right"] for row in rows) / len(rows),
            "tokens_per_forward": sum(map(len, g.tokens)) / sum(g.forwards),
            "rows": rows,
        }
    return {
        "model": MODEL,
        "seconds": sum(g.seconds for g in runs.values()),
        "compile_seconds": sum(g.compile_seconds for g in runs.values()),
        "modes": modes,
    }

"""What is said beside the drawings, the same in all of them."""

from twotower_jax.trace.record import Row, Trace

ABOUT = {
    "diffusion": "A block of masks is filled by the denoiser tower. Each pass predicts every masked position at once"
    " and writes only what it is sure of; what is written helps the next pass. The context tower then reads the block.",
    "verified": "The denoiser tower drafts a block of masks in a few passes. One pass of the context tower says what it"
    " would have written itself: drafts that agree become text, and its own token follows them.",
    "ar": "The context tower writes one token a pass, from left to right: nothing is drafted, nothing waits.",
    "mock-ar": "The denoiser tower writes one token a pass, from left to right: a diagnostic of its training.",
}


def settings(trace: Trace) -> str:
    """One line."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in trace.settings.items())


def counted(number: int, thing: str) -> str:
    """`1 token`, `2 tokens`, `3 passes`."""
    plural = thing + ("es" if thing.endswith("s") else "s")
    return f"{number:,} {thing if number == 1 else plural}"


def rate(row: Row) -> str:
    """Tokens per pass, of the tower whose passes write them; in verified decoding of both."""
    if row.mode in ("ar", "mock-ar"):
        return "1 token a pass"
    passes, whose = (sum(row.forwards), "") if row.mode == "verified" else (row.forwards[0], "denoiser ")
    return f"{len(row.tokens) / passes:.3g} tokens per {whose}pass" if passes else "no pass"


def counts(row: Row) -> list[str]:
    """What it took."""
    found = [counted(len(row.tokens), "token"), counted(row.forwards[0], "denoiser pass")]
    found += [f"{counted(row.forwards[1], 'context pass')} (the prompt's is one)", rate(row)]
    if row.mode == "verified":
        kept = sum(block.kept for block in row.blocks)
        wrong = sum(len(b.tokens) - b.given - b.kept for b in row.blocks if b.correction is not None)
        found.append(f"{counted(kept, 'draft')} accepted, {wrong:,} rejected")
    return found


def alone(row: Row) -> int:
    """The passes that the context tower would need for as many tokens, one at a time; the prompt's gives the first."""
    return len(row.tokens)


def ending(row: Row) -> str:
    """Why there is no more."""
    return {
        "stop": "The text ended itself.",
        "length": "The text was ended by the number of tokens asked for.",
        "cancelled": "The text was cancelled.",
        "error": "The text was ended by an error: a logit was not finite.",
    }[row.end]

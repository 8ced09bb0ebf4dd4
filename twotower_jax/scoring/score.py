"""Scores of pairs of a context and its continuation."""

import dataclasses
import math
import time
from collections.abc import Sequence

from twotower_jax.placement import Towers
from twotower_jax.programs import Programs
from twotower_jax.scoring import pairs as asked
from twotower_jax.scoring.bound import Bound
from twotower_jax.scoring.pairs import Pair
from twotower_jax.scoring.scorer import Scorer

BY = ("context", "denoiser")
BROKEN = "a logit was not finite"


@dataclasses.dataclass(frozen=True)
class Scores:
    """What `Model.score` found, a list entry a pair; None stands where there is an error.

    Attributes:
      logprobs: log p(continuation | context), natural; by the denoiser a lower bound on it.
      greedy: whether every token of the continuation is the most probable one, of equals the first; None by the
        denoiser.
      standard_errors: of the bound's estimate; None by the context tower.
      per_token: each token's part of `logprobs`; None unless asked for.
      errors: None, or why there is no score.
      tokens_read: by the context tower, of all pairs together.
      seconds: of the run, all pairs together, without compilation.
      compile_seconds: 0 if the programs were there already.
    """

    logprobs: list[float | None]
    greedy: list[bool | None] | None
    standard_errors: list[float | None] | None
    per_token: list[list[float] | None] | None
    errors: list[str | None]
    tokens_read: int
    seconds: float
    compile_seconds: float


def score(
    towers: Towers,
    programs: Programs,
    params: dict,
    pairs: Sequence[Pair],
    *,
    per_token: bool,
    block_size: int,
    bound: Bound | None,
) -> Scores:
    """See `Model.score`; everything is checked, and without a bound it is by the context tower."""
    compiled, start = programs.compile_seconds, time.perf_counter()
    tokens_read = 0
    if pairs:
        longest = max(len(pair.context) + len(pair.continuation) for pair in pairs)
        scorer = Scorer(towers, programs, params, longest, block_size, bound)
        shares = asked.in_shares(pairs, scorer.shards)
        if bound is None:
            trees = [asked.for_context(own, scorer.most) for own in shares]
        else:
            trees = [asked.for_denoiser(own, scorer.most, block_size) for own in shares]
        tokens_read = scorer.read(trees)
    compile_seconds = programs.compile_seconds - compiled

    def of_each(value):
        return [None if pair.broken else value(pair) for pair in pairs]

    return Scores(
        logprobs=of_each(lambda pair: math.fsum(pair.logprobs)),
        greedy=of_each(lambda pair: pair.greedy) if bound is None else None,
        standard_errors=None if bound is None else of_each(lambda pair: math.sqrt(pair.variance)),
        per_token=of_each(lambda pair: pair.logprobs.tolist()) if per_token else None,
        errors=[BROKEN if pair.broken else None for pair in pairs],
        tokens_read=tokens_read,
        seconds=time.perf_counter() - start - compile_seconds,
        compile_seconds=compile_seconds,
    )

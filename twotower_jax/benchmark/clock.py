"""How long work on a device takes."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

SAMPLES = 5
SHORTEST = 0.02  # seconds of a sample at least: shorter work is repeated in it


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Of one call, over the samples: their median and their least."""

    median: float
    least: float


def seconds(
    start: Callable[[], Any], samples: int = SAMPLES, clock: Callable[[], float] = time.perf_counter
) -> Seconds:
    """How long a call takes until all arrays that it gives are there; the first two are not among the samples.

    Args:
      start: starts the work, and gives arrays, of which each call's are waited for.
      samples: of which each has as many calls as take `SHORTEST`.
      clock: gives the seconds.
    """

    def sample(calls: int) -> float:
        begin = clock()
        for _ in range(calls):
            jax.block_until_ready(start())
        return (clock() - begin) / calls

    sample(1)
    calls = math.ceil(SHORTEST / max(sample(1), 1e-6))
    found = [sample(calls) for _ in range(samples)]
    return Seconds(statistics.median(found), min(found))

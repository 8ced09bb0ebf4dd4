"""The bound of masked diffusion on a block's likelihood, by sampled masks."""

import dataclasses
import hashlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class Bound:
    """How a block's bound is estimated.

    With the linear schedule, and t = k / n as decoding gives it, log p(x) >= E_k E_masks n / k sum log p(x_i | the
    others), over the k masked of n positions, k uniform on 1 .. n: the integral over t of the weight 1 / t, done for
    each k (paper, training; arXiv 2110.02037).

    Attributes:
      samples: masks of each block, two or more.
      mask_id: the token that stands for a masked position.
      seed: of the masks.
    """

    samples: int
    mask_id: int
    seed: int

    def masks(self, context: np.ndarray, number: int, size: int) -> np.ndarray:
        """Of the block of this number: (samples, size) bool, with 1 to `size` positions, stratified over the samples.

        They depend on the seed, the context's tokens and the block's number alone: continuations of one context are
        compared under the same masks.
        """
        digest = hashlib.sha256(context.astype("<i4").tobytes()).digest()
        rng = np.random.default_rng([self.seed, number, *np.frombuffer(digest, "<u4").tolist()])
        strata = (np.arange(self.samples) + rng.random(self.samples)) / self.samples
        count = 1 + np.minimum(np.floor(strata * size), size - 1)
        order = rng.permuted(np.tile(np.arange(size), (self.samples, 1)), axis=1)
        return order < count[:, None]


def estimate(masks: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, float]:
    """The bound on a block's log-likelihood.

    Args:
      masks: (samples, n) bool.
      logprobs: (samples, n), of which those under masks are used.

    Returns:
      each position's part of it, (n,), and the variance of their sum, as if samples were independent: strata make it
      less.
    """
    weight = masks.shape[1] / masks.sum(1, keepdims=True)
    parts = np.where(masks, weight * logprobs, 0.0)
    return parts.mean(0), parts.sum(1).var(ddof=1) / len(masks)

"""The bound of masked diffusion on a block's likelihood, by sampled masks."""

import hashlib

import numpy as np


def draw_masks(seed: int, context: np.ndarray, number: int, size: int, samples: int) -> np.ndarray:
    """Masks (samples, size) bool: k positions of a block, k from 1 to `size` and stratified over the samples.

    They depend on the seed, the context's tokens and the block's number alone: continuations of one context are
    compared under the same masks.
    """
    digest = hashlib.sha256(context.astype("<i4").tobytes()).digest()
    rng = np.random.default_rng([seed, number, *np.frombuffer(digest, "<u4").tolist()])
    strata = (np.arange(samples) + rng.random(samples)) / samples
    count = 1 + np.minimum(np.floor(strata * size), size - 1)
    order = rng.permuted(np.tile(np.arange(size), (samples, 1)), axis=1)
    return order < count[:, None]


def estimate(masks: np.ndarray, logprobs: np.ndarray) -> tuple[np.ndarray, float]:
    """The bound on a block's log-likelihood, and the variance of its estimate.

    With the linear schedule, log p(x) >= E_k E_masks n / k sum over the k masked positions of log p(x_i | the others),
    k being uniform on 1 .. n: the integral over t of the weight 1 / t, done for each k (paper, training; arXiv
    2406.07524).

    Args:
      masks: (samples, n) bool.
      logprobs: (samples, n), of which those under masks are used.

    Returns:
      each position's share of the bound, (n,), and the variance of their sum, as if samples were independent: strata
      make it less.
    """
    weight = masks.shape[1] / masks.sum(1, keepdims=True)
    shares = np.where(masks, weight * logprobs, 0.0)
    return shares.mean(0), shares.sum(1).var(ddof=1) / len(masks)

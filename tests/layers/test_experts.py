"""The ways of running the experts."""

import jax.numpy as jnp
import numpy as np
import pytest

from twotower_jax.layers import experts

WAYS = [experts.routed, experts.picked, experts.together, experts.in_pieces, experts.in_tiles]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tokens", [1, 2, 16, experts.TOKENS_AT_ONCE + 1])
def test_every_chosen_expert_answers(tokens, way):
    """Every implementation is the plain sum; most tokens choose the same expert, and some one that is not here."""
    rng = np.random.default_rng(tokens)
    total, chosen, width, inner = 12, 2, 8, 6
    x, up, down = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((tokens, width), (total, inner, width), (total, inner, width))
    )
    chosen_experts = np.stack([np.full(tokens, 7), rng.integers(8, total + 1, tokens)], axis=1)
    chosen_experts[::5] = [3, 1]
    weights = rng.random((tokens, chosen)).astype(np.float32)
    weights[chosen_experts == total] = 0
    expected = np.zeros_like(x)
    for token in range(tokens):
        for e, weight in zip(chosen_experts[token] % total, weights[token], strict=True):
            expected[token] += weight * (np.maximum(up[e] @ x[token], 0) ** 2 @ down[e])
    y = way(*map(jnp.asarray, (x, chosen_experts, weights, up, down)))
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())

"""A denoiser whose conditionals are exact: one position at a time, draws have the model's own distribution."""

import numpy as np
import pytest
from scipy.stats import chi2

from experiments.sampler_bias import MASK, ONE_AT_A_TIME, TOKENS, HiddenMarkov, counted, distance, draw_texts

ROWS = 40_000


def p_value(counts, joint):
    """Of Pearson's test, rare texts taken together."""
    expected = joint.ravel() * counts.sum()
    rare = expected < 10
    counts = np.append(counts.ravel()[~rare], counts.ravel()[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    return chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1)


@pytest.mark.parametrize("rule", ["entropy", "margin", "factor"])
def test_one_position_at_a_time_is_exact(rule):
    model = HiddenMarkov()
    texts, passes = draw_texts(model, rule, ONE_AT_A_TIME[rule], ROWS)
    assert (np.asarray(passes) == texts.shape[1]).all()
    assert p_value(counted(texts), model.joint()) > 1e-3


def test_the_papers_rule_is_biased():
    """It commits positions by what they happen to draw: one at a time, too, the test rejects it."""
    model = HiddenMarkov()
    texts, passes = draw_texts(model, "threshold", ONE_AT_A_TIME["threshold"], ROWS)
    assert (np.asarray(passes) == texts.shape[1]).all()
    assert p_value(counted(texts), model.joint()) < 1e-9


def test_all_at_once_is_the_product_of_the_marginals():
    """The other end: whatever a rule looks at, positions of one pass are drawn independently."""
    model = HiddenMarkov()
    joint = model.joint()
    texts, _ = draw_texts(model, "margin", -1.0, ROWS)
    marginals = [joint.sum(tuple(j for j in range(joint.ndim) if j != i)) for i in range(joint.ndim)]
    product = np.einsum("a,b,c,d->abcd", *marginals)
    assert p_value(counted(texts), product) > 1e-3
    assert distance(counted(texts), joint) > 0.05


def test_conditionals_are_the_joints():
    model = HiddenMarkov(3)
    joint = model.joint()
    tokens, masked = np.array([[2, MASK, 1, MASK]]), np.array([[False, True, False, True]])
    found = np.exp(model.logits(tokens, masked))[0, :, :TOKENS]
    given = joint[2, :, 1, :] / joint[2, :, 1, :].sum()
    np.testing.assert_allclose(found[1], given.sum(1), atol=1e-5)
    np.testing.assert_allclose(found[3], given.sum(0), atol=1e-5)

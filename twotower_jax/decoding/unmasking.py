"""Which masked positions a denoising step commits, and which committed ones it masks again.

A rule looks at a pass's logits and what the passes before it showed; none asks for a further pass. Each says how
certain a position is, and how many of the most certain ones it would commit; `Unmasking` does the rest alike for all.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from twotower_jax import inputs
from twotower_jax.decoding.block import Block, History
from twotower_jax.decoding.sampling import of_rows
from twotower_jax.decoding.vocabulary import ONE_DEVICE, Vocabulary
from twotower_jax.errors import InputError, short

CREDIT_DECAY, CREDIT_POWER, CREDIT_WEIGHT = 0.7, 0.5, 0.65  # beta, gamma and alpha of `credit`


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a pass shows of the positions of blocks.

    Attributes:
      logits: (B, S, V) float32.
      predicted: (B, S) int32, what would be committed.
      masked: (B, S) bool.
      vocabulary: of the logits.
    """

    logits: jax.Array
    predicted: jax.Array
    masked: jax.Array
    vocabulary: Vocabulary = ONE_DEVICE

    @functools.cached_property
    def confidence(self) -> jax.Array:
        """(B, S) float32, the probability of what is predicted."""
        return self.vocabulary.probability(self.logits, self.predicted)

    @functools.cached_property
    def top(self) -> jax.Array:
        """(B, S) float32, the probability of the most probable token, whatever is drawn."""
        return self.vocabulary.probability(self.logits, self.vocabulary.argmax(self.logits))

    @functools.cached_property
    def entropy(self) -> jax.Array:
        """(B, S) float32, in nats."""
        down = self.logits - self.vocabulary.max(self.logits)
        weight = jnp.exp(down)
        total = self.vocabulary.sum(weight)
        part = self.vocabulary.sum(jnp.where(weight > 0, weight * down, 0.0))
        return (jnp.log(total) - part / total)[..., 0]

    @functools.cached_property
    def margin(self) -> jax.Array:
        """(B, S) float32, between the probabilities of the two most probable tokens."""
        v = self.vocabulary
        best = v.argmax(self.logits)
        second = v.argmax(jnp.where(v.ids(self.logits) == best[..., None], -jnp.inf, self.logits))
        return v.probability(self.logits, best) - v.probability(self.logits, second)


def _above(certainty: jax.Array, bound: jax.Array, masked: jax.Array) -> tuple[jax.Array, jax.Array]:
    return certainty, (masked & (certainty > bound[:, None])).sum(-1)


def threshold(seen: Seen, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The probability of what is predicted above gamma (TwoTower, section 3): the default, gamma 0.8, is NVIDIA's.

    Above temperature 0 it prefers positions that happen to draw a probable token, and so draws too many of these, one
    position at a time too (`python -m experiments.sampler_bias`); the other rules do not look at what is drawn.
    """
    return _above(seen.confidence, bound, seen.masked)


def sure(seen: Seen, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The probability of the most probable token above gamma."""
    return _above(seen.top, bound, seen.masked)


def factor(seen: Seen, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest n with (n + 1) (1 - c_n) < f, c_n being the n-th highest probability of a most probable token
    (Fast-dLLM, 2505.22618).
    """
    ordered = -jnp.sort(jnp.where(seen.masked, -seen.top, jnp.inf), axis=-1)
    n = jnp.arange(1, ordered.shape[-1] + 1)
    return seen.top, ((n + 1) * (1 - ordered) < bound[:, None]).sum(-1)


def entropy(seen: Seen, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest set with sum of H - max of H <= gamma, lowest entropies first: a bound, in nats, of what the
    positions could tell of each other (EB-sampler, 2505.24857).
    """
    ordered = jnp.sort(jnp.where(seen.masked, seen.entropy, jnp.inf), axis=-1)
    before = jnp.pad(jnp.cumsum(ordered, axis=-1), [(0, 0), (1, 0)])[:, :-1]
    return -seen.entropy, (jnp.isfinite(ordered) & (before <= bound[:, None])).sum(-1)


def margin(seen: Seen, bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two most probable tokens further apart than gamma (top-two margin, 2502.06768)."""
    return _above(seen.margin, bound, seen.masked)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule as it is chosen.

    Attributes:
      wanted: what it sees and its bound (B,) -> certainty (B, S) and how many positions to commit (B,).
      bound: unless another is given; at most `most`.
      most: the largest.
      doubt: committed tokens that a later pass gives less probability are masked again; 0 in most rules.
      credit: whether logits are weighed by what earlier passes predicted.
    """

    wanted: Callable[[Seen, jax.Array], tuple[jax.Array, jax.Array]]
    bound: float
    most: float = 1.0
    doubt: float = 0.0
    credit: bool = False


RULES = {
    "threshold": Rule(threshold, 0.8),
    "factor": Rule(factor, 1.0, most=1e6),
    "entropy": Rule(entropy, 0.1, most=1e6),
    "margin": Rule(margin, 0.7),
    "credit": Rule(sure, 0.9, credit=True),  # CreditDecoding, 2510.06133: see `with_credit`
    "remask": Rule(sure, 0.6, doubt=0.3),  # WINO, 2507.18578: see `Unmasking.choose`
}
NAMES = tuple(RULES)
DEFAULT = "threshold"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A rule and its numbers; see `Rule`."""

    rule: str
    bound: float
    doubt: float


def chosen(text: Any) -> Choice:
    """A rule as callers write it: `factor`, `factor=1.5`, `remask=0.6,0.3`.

    Raises:
      InputError: there is no such rule, or it has no such numbers.
    """
    name, _, numbers = text.partition("=") if isinstance(text, str) else (text, "", "")
    if name not in NAMES:
        raise InputError(f"unmasking {short(text)} does not exist; choose {', '.join(NAMES)}, as NAME or NAME=NUMBER")
    rule = RULES[name]
    given = numbers.split(",") if "=" in text else []
    if len(given) > 1 + (rule.doubt > 0):
        many = "two numbers" if rule.doubt else "one number"
        raise InputError(f"unmasking {name} takes {many} at most, not {short(text)}")
    try:
        values = [float(number) for number in given]
    except ValueError:
        raise InputError(f"unmasking takes NAME=NUMBER such as {name}={rule.bound:g}, not {short(text)}") from None
    bound, doubt = values + [rule.bound, rule.doubt][len(values) :]
    inputs.number(f"unmasking {name}", bound, 0, rule.most)
    inputs.number(f"unmasking {name}'s second number", doubt, 0, 1)
    return Choice(name, bound, doubt)


def with_credit(logits: jax.Array, history: History, step: jax.Array, vocabulary: Vocabulary) -> jax.Array:
    """logits + alpha log(1 + C), where C_t(v) = beta C_{t-1}(v) + [v is the top token] p_t(v)^gamma.

    The credit of CreditDecoding (arXiv 2510.06133); beta, gamma and alpha are above.

    Args:
      logits: (B, S, V) float32 of pass `step`, which the history has already.
      history: of all passes.
      step: (B,) int32.
      vocabulary: of the logits.
    """
    passes = jnp.arange(history.top.shape[1])
    age = step[:, None] - passes
    weight = jnp.where((age >= 0)[..., None], CREDIT_DECAY ** age[..., None] * history.probability**CREDIT_POWER, 0.0)
    same = history.top[:, :, None] == history.top[:, None]  # (B, P, P, S)
    credit = jnp.einsum("bpqs,bqs->bps", same.astype(jnp.float32), weight)
    first = ~jnp.tril(same.transpose(0, 3, 1, 2), -1).any(-1).transpose(0, 2, 1)  # each token once
    boost = jnp.where(first & (age >= 0)[..., None], CREDIT_WEIGHT * jnp.log1p(credit), 0.0)
    return vocabulary.add(logits, history.top.swapaxes(1, 2), boost.swapaxes(1, 2))


@struct.dataclass
class Unmasking:
    """The rules of rows. Every number is one for all rows, (), or one for each, (B,).

    Attributes:
      bound: the rule's number.
      steps: T, 1 or more: a block is full after so many passes.
      rule: index of `NAMES`.
      doubt: see `Rule`.
      rules: those that a row may have.
    """

    bound: jax.Array | float
    steps: jax.Array | int
    rule: jax.Array | int = 0
    doubt: jax.Array | float = 0.0
    rules: tuple[str, ...] = struct.field(pytree_node=False, default=NAMES[:1])

    def weigh(self, logits: jax.Array, history: History, step: jax.Array, vocabulary: Vocabulary) -> jax.Array:
        """The logits that tokens are predicted from, (B, S, V)."""
        for name in self.rules:
            if RULES[name].credit:
                own = of_rows(self._is(name), 2)
                logits = jnp.where(own, with_credit(logits, history, step, vocabulary), logits)
        return logits

    def choose(self, seen: Seen, block: Block) -> tuple[jax.Array, jax.Array]:
        """Commits the max(wanted, 1, ceil(n / (T - i))) most certain of n masked positions at step i; of equals the
        leftmost first. A rule that doubts masks committed tokens again, the least probable first, but fewer than are
        committed, and none at the last step: every pass gets on.

        Args:
          seen: what the pass shows.
          block: before it.

        Returns:
          what is committed, (B, S) bool, a subset of what is masked, and what is masked again, likewise of the others.
        """
        masked = block.masked
        bound = jnp.broadcast_to(self.bound, block.step.shape)
        certainty, wanted = jnp.zeros(masked.shape, jnp.float32), jnp.zeros(block.step.shape, jnp.int32)
        for name in self.rules:
            own = self._is(name)
            of_rule = RULES[name].wanted(seen, bound)
            certainty = jnp.where(of_rows(own, 1), of_rule[0], certainty)
            wanted = jnp.where(own, of_rule[1], wanted)
        left, remaining = masked.sum(-1), jnp.maximum(self.steps - block.step, 1)
        share = (left + remaining - 1) // remaining
        wanted = jnp.maximum(jnp.maximum(wanted, share), 1)
        commit = masked & (_rank(jnp.where(masked, certainty, -jnp.inf)) < wanted[:, None])
        if not any(RULES[name].doubt for name in self.rules):
            return commit, jnp.zeros_like(commit)
        probability = seen.vocabulary.probability(seen.logits, block.tokens)
        doubted = block.real & ~masked & (probability < of_rows(self.doubt, 1))
        room = jnp.where(remaining > 1, commit.sum(-1) - 1, 0)
        return commit, doubted & (_rank(jnp.where(doubted, -probability, -jnp.inf)) < room[:, None])

    def _is(self, name: str) -> jax.Array:
        return jnp.asarray(self.rule) == NAMES.index(name)


def _rank(value: jax.Array) -> jax.Array:
    """Of each in its row (B, S), the largest being 0, the leftmost of equals first."""
    order = jnp.argsort(value, axis=-1, descending=True, stable=True)
    return jnp.argsort(order, axis=-1)

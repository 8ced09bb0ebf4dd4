"""What parallel decoding does to a distribution: a hidden Markov model, whose conditionals are exact, denoises.

    python -m experiments.sampler_bias

Texts of four tokens are drawn at temperature 1, and counted. A denoiser that knows every conditional can still only
draw positions of one pass independently: what is shown is the rule's own bias, as the total variation distance from the
model's distribution; "noise" is that of as many exact draws.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments import harness
from experiments.unmasking import SWEEPS
from twotower_jax.decoding.block import masked_block
from twotower_jax.decoding.diffusion import Diffusion, refine
from twotower_jax.decoding.sampling import Sampler, position_keys, row_keys
from twotower_jax.decoding.unmasking import NAMES, RULES, Unmasking

STATES, TOKENS, LENGTH = 3, 4, 4
MASK = TOKENS  # the id after the last
ONE_AT_A_TIME = {"threshold": 1.0, "factor": 0.0, "entropy": 0.0, "margin": 1.0, "credit": 1.0, "remask": 1.0}


class HiddenMarkov:
    """start (H,), step (H, H) and emission (H, V), drawn so that neighbours tell of each other."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.start = rng.dirichlet(np.ones(STATES))
        self.step = rng.dirichlet(0.3 * np.ones(STATES), STATES)
        self.emission = rng.dirichlet(0.1 * np.ones(TOKENS), STATES)

    def joint(self) -> np.ndarray:
        """The probability of every text, (V,) * L."""
        ahead = self.start[:, None] * self.emission  # hidden state, tokens so far
        for _ in range(LENGTH - 1):
            ahead = np.einsum("h...,hg,gv->g...v", ahead, self.step, self.emission)
        return ahead.sum(0)

    def logits(self, tokens: jax.Array, masked: jax.Array) -> jax.Array:
        """Of every token at every position, given those that are not masked: (B, L) -> (B, L, V + 1)."""
        own = jnp.where(masked[..., None], 1.0, jnp.asarray(self.emission.T)[jnp.minimum(tokens, TOKENS - 1)])
        before, after = [jnp.broadcast_to(self.start, own[:, 0].shape)], [jnp.ones_like(own[:, 0])]
        for i in range(LENGTH - 1):
            before.append((before[-1] * own[:, i]) @ self.step)
            after.insert(0, (after[0] * own[:, LENGTH - 1 - i]) @ self.step.T)
        hidden = jnp.stack(before, 1) * jnp.stack(after, 1)
        hidden /= hidden.sum(-1, keepdims=True)
        return jnp.pad(jnp.log(hidden @ self.emission), [(0, 0), (0, 0), (0, 1)])


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def draw_texts(model: HiddenMarkov, rule: str, bound: float, rows: int) -> tuple[jax.Array, jax.Array]:
    """Texts (rows, L) by a rule, and the passes that they took, (rows,)."""
    numbers = jnp.arange(rows)
    keys = position_keys(row_keys(jnp.uint32(0), numbers), jnp.broadcast_to(jnp.arange(LENGTH), (rows, LENGTH)))
    unmasking = Unmasking(bound, LENGTH, NAMES.index(rule), RULES[rule].doubt, (rule,))
    rules = Diffusion(Sampler.of(1.0), unmasking, MASK)
    block = masked_block(jnp.ones(rows, bool), jnp.full(rows, LENGTH), LENGTH, MASK)

    def step(block):
        return refine(rules, block, model.logits(block.tokens, block.masked), keys)

    block = jax.lax.while_loop(lambda block: block.masked.any(), step, block)
    return block.tokens, block.step


def counted(texts: jax.Array) -> np.ndarray:
    """How often each text occurs, (V,) * L."""
    shape = (TOKENS,) * LENGTH
    return np.bincount(np.ravel_multi_index(np.asarray(texts).T, shape), minlength=TOKENS**LENGTH).reshape(shape)


def distance(counts: np.ndarray, expected: np.ndarray) -> float:
    """Total variation."""
    return float(abs(counts / counts.sum() - expected).sum() / 2)


def draw(axes, results):
    """The distance against tokens a pass."""
    for rule, marker in zip(NAMES, "osD^vP", strict=True):
        points = sorted(results["rules"][rule].values(), key=lambda p: p["tokens_per_pass"])
        x, y = zip(*[(p["tokens_per_pass"], p["distance"]) for p in points], strict=True)
        axes.plot(x, y, marker=marker, markersize=4, linewidth=1, label=rule)
    axes.axhline(results["noise"], color="black", linewidth=0.8, linestyle=":", label="noise")
    axes.set(xlabel="tokens per pass", ylabel="total variation from the model", ylim=(0, None))
    axes.set_title("The bias of drawing positions together")
    axes.legend(fontsize=8)


def main():
    rows = harness.parser(__doc__).parse_args().rows or 100_000
    model = HiddenMarkov()
    joint = model.joint()
    exact = np.random.default_rng(1).multinomial(rows, joint.ravel()).reshape(joint.shape)
    results = {"texts": rows, "noise": distance(exact, joint), "rules": {}}
    print(f"noise: {results['noise']:.4f}")
    for rule in NAMES:
        results["rules"][rule] = found = {}
        for bound in sorted({*SWEEPS[rule], ONE_AT_A_TIME[rule]}):
            texts, passes = draw_texts(model, rule, bound, rows)
            p = {"distance": distance(counted(texts), joint), "tokens_per_pass": float(LENGTH / passes.mean())}
            found[str(bound)] = p
            print(f"{rule}={bound:g}: {p['distance']:.4f}, {p['tokens_per_pass']:.2f} tokens a pass", flush=True)
    harness.save("sampler_bias", results, draw)


if __name__ == "__main__":
    harness.command(main)

"""One token a step: by the context tower (AR), or by the denoiser without time conditioning (mock-AR)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from twotower_jax import two_tower
from twotower_jax.config import Config
from twotower_jax.decoding.sampling import Sampler, position_keys, row_keys
from twotower_jax.decoding.stopping import broken, holds


@struct.dataclass
class Progress:
    """Rows between two tokens: tokens (B, n), of which `length` (B,) count; `logits` (B, V) are the next token's."""

    carry: Any
    logits: jax.Array
    tokens: jax.Array
    index: jax.Array
    length: jax.Array
    done: jax.Array
    failed: jax.Array


def generate(
    config: Config,
    params: dict,
    sampler: Sampler,
    prompts: jax.Array,
    count: jax.Array,
    rows: jax.Array,
    seed: jax.Array,
    eos: jax.Array,
    limit: jax.Array,
    *,
    capacity: int,
    max_tokens: int,
    mock: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Token after token, until every row has ended or `limit` are done; `diffusion.generate` has the arguments.

    Returns:
      tokens (B, max_tokens), how many of them count (B,), forwards (B,), whether a logit was not finite (B,).
    """
    start, step = (_mock_ar if mock else _ar)(config, params)
    logits, carry = start(prompts, count, capacity)
    keys = row_keys(seed, rows)

    def append(p: Progress) -> Progress:
        """Draws the next token of every row from its logits."""
        draw = position_keys(keys, (count + p.index)[:, None])
        token = sampler.predict(p.logits[:, None], draw)
        failed = ~p.done & broken(p.logits[:, None])
        written = ~p.done & ~failed
        return p.replace(
            tokens=jax.lax.dynamic_update_slice(p.tokens, token, (0, p.index)),
            index=p.index + 1,
            length=p.length + written,
            done=p.done | failed | holds(token, eos),
            failed=p.failed | failed,
        )

    def one_token(p: Progress) -> Progress:
        token = jax.lax.dynamic_slice_in_dim(p.tokens, p.index - 1, 1, axis=1)[:, 0]
        logits, carry = step(p.carry, token, (~p.done).astype(jnp.int32))
        return append(p.replace(carry=carry, logits=logits))

    none, no = jnp.zeros(prompts.shape[0], jnp.int32), jnp.zeros(prompts.shape[0], bool)
    progress = Progress(
        carry=carry,
        logits=logits,
        tokens=jnp.zeros((prompts.shape[0], max_tokens), jnp.int32),
        index=jnp.zeros((), jnp.int32),
        length=none,
        done=no,
        failed=no,
    )
    p = jax.lax.while_loop(lambda p: (p.index < limit) & ~p.done.all(), one_token, append(progress))
    return p.tokens, p.length, p.length + p.failed, p.failed


def _ar(config: Config, params: dict):
    """The carry is the context's state after every token drawn but the last."""

    def start(prompts, count, capacity):
        hidden, state = two_tower.prefill(config, params, prompts, count, capacity)
        return two_tower.context_head(params, hidden), state

    def step(state, token, count):
        hidden, state = two_tower.extend(config, params, state, token[:, None], count)
        return two_tower.context_head(params, hidden[:, 0]), state

    return start, step


def _mock_ar(config: Config, params: dict):
    """The denoiser reads the last token with the context from before it: the carry is (that state, the last token)."""

    def predict(state, token):
        return two_tower.denoise(config, params, state, token[:, None], t=None)[:, 0]

    def start(prompts, count, capacity):
        last = jnp.take_along_axis(prompts, count[:, None] - 1, axis=1)[:, 0]
        _, state = two_tower.prefill(config, params, prompts, count - 1, capacity)
        return predict(state, last), (state, last)

    def step(carry, token, count):
        state, last = carry
        _, state = two_tower.extend(config, params, state, last[:, None], count)
        return predict(state, token), (state, token)

    return start, step

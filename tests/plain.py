"""A request decoded by itself, step by step from the host: what the engine's rows are compared with."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from twotower_jax import two_tower
from twotower_jax.decoding.block import masked_block
from twotower_jax.decoding.diffusion import Diffusion, denoise_step
from twotower_jax.decoding.sampling import Sampler, position_keys, row_keys
from twotower_jax.decoding.unmasking import NAMES, Unmasking

CAPACITY, MASK = 192, 3

_prefill = jax.jit(two_tower.prefill, static_argnums=(0, 4))
_extend = jax.jit(two_tower.extend, static_argnums=0)
_head = jax.jit(two_tower.context_head)
_denoise = jax.jit(two_tower.denoise, static_argnums=0)
_step = jax.jit(denoise_step, static_argnums=0)
_draw = jax.jit(Sampler.predict)


@functools.partial(jax.jit, static_argnums=3)
def _keys(r_seed, r_row, start, size):
    return position_keys(row_keys(r_seed, r_row), start + jnp.arange(size)[None])


def alone(model, r):
    """The tokens of a request, and the passes that it needed: of the denoiser, or of AR's context tower."""
    c, params = model.config, model.params
    stops = np.atleast_1d([] if r.eos_token_id is None else r.eos_token_id)
    sampler = Sampler.of(r.temperature, r.top_k, r.top_p)
    before = r.read_first
    prompt = np.zeros((1, 128), np.int32)
    prompt[0, :before] = r.prompt[:before]
    _, state = _prefill(c, params, prompt, np.array([before]), CAPACITY)
    written, passes, last = [], 0, r.prompt[-1]
    while len(written) < r.max_new_tokens and not np.isin(written, stops).any():
        at = np.array([len(r.prompt) + len(written)])
        keys = _keys(np.array([r.seed], np.uint32), np.array([r.row]), at, r.block)
        if r.mode == "diffusion":
            rule = r.checked(c.vocab_size, True).unmasking
            number = NAMES.index(rule.rule)
            unmasking = Unmasking(np.float32(rule.bound), r.steps_per_block, number, np.float32(rule.doubt), NAMES)
            rules = Diffusion(sampler, unmasking, MASK)
            block = masked_block(jnp.array([True]), np.array([r.block]), r.block, MASK)
            while block.masked.any():
                block, passes = _step(c, params, rules, state, block, keys), passes + 1
            new = block.tokens
            _, state = _extend(c, params, state, new, np.array([r.block]))
        else:
            hidden, after = _extend(c, params, state, np.array([[last]]), np.array([1]))
            logits = _head(params, hidden) if r.mode == "ar" else _denoise(c, params, state, np.array([[last]]), None)
            new, state, passes = _draw(sampler, logits, keys), after, passes + 1
        written += np.asarray(new)[0].tolist()
        last = written[-1]
    written = written[: r.max_new_tokens]
    ends = np.flatnonzero(np.isin(written, stops))
    return written[: ends[0] + 1 if len(ends) else None], passes

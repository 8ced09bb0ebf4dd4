"""The time network against the reference, its rounding in bfloat16, and its identity at the start of training."""

import jax
import jax.numpy as jnp
import numpy as np

from twotower_jax.layers.time_conditioning import FREQUENCIES, TimeConditioning, sinusoid


def test_equals_reference(golden):
    p = golden.model.params["denoiser"]["time"]
    for key in [key for key in golden.names if key.startswith("time/")]:
        t = jnp.array([float(key.removeprefix("time/"))])
        y = TimeConditioning(golden.model.config).shared(p, t)[0]
        np.testing.assert_allclose(y, golden[key], atol=5e-6)


def test_bfloat16_rounds_t_as_the_reference_does():
    """1000 t = 937.5 is 936 there; under jit too, where a pair of casts may be simplified away."""
    features = jax.jit(sinusoid, static_argnums=1)(jnp.array([0.9375]), jnp.dtype(jnp.bfloat16))
    angles = 936 * FREQUENCIES.astype(np.float64)
    np.testing.assert_allclose(features[0], np.concatenate([np.cos(angles), np.sin(angles)]), atol=1e-4)
    exact = jax.jit(sinusoid, static_argnums=1)(jnp.array([0.9375]), jnp.dtype(jnp.float32))
    assert np.abs(exact - features).max() > 0.5


def test_fresh_conditioning_is_the_identity(tiny):
    module = TimeConditioning(tiny.model.config)
    params = module.init(jax.random.key(0), jnp.zeros(1))
    shift, scale, gate = jnp.moveaxis(module.apply(params, jnp.array([0.0, 0.3, 1.0])), 2, 0)
    assert (shift == 0).all()
    assert (scale == 0).all()
    assert (gate == 1).all()

"""Nemotron-TwoTower in JAX: two towers, three ways of decoding.

import twotower_jax as tt
model = tt.load("demo")
model.generate_mask_diffusion([[1, 2, 3]]).tokens
"""

from twotower_jax.errors import InputError
from twotower_jax.model import Generation, Model, load

__all__ = ["Generation", "InputError", "Model", "load"]

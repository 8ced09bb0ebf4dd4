"""Nemotron-TwoTower in JAX: two towers, three ways of decoding.

import twotower_jax as tt
model = tt.load("demo")
model.generate_mask_diffusion([[1, 2, 3]]).tokens
"""

from typing import TYPE_CHECKING

from twotower_jax.errors import InputError

if TYPE_CHECKING:
    from twotower_jax.model import Event, Generation, Model, Placement, Request, Scores, load

__all__ = ["Event", "Generation", "InputError", "Model", "Placement", "Request", "Scores", "load"]


def __getattr__(name: str):
    """JAX is imported when it is first needed: the command answers at once, and to Ctrl-C as well."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from twotower_jax import model

    return getattr(model, name)

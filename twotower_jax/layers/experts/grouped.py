"""The chosen experts alone, by kernels that multiply the tokens of each with its matrices."""

import functools
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from twotower_jax.layers.experts.tiles import Sorted, Unsorted, by_expert
from twotower_jax.layers.mlp import relu2


class Kernels(Protocol):
    """Products of n = tokens k choices, each with the matrix of its expert.

    Rows (n, F) lie in the order of `choices`; those of experts that are not here are never read, and may hold anything.
    """

    def choices(self, experts: jax.Array, total: int) -> Sorted | Unsorted:
        """How to order experts (tokens, k) where no gradient is taken."""

    def widen(self, x: jax.Array, up: jax.Array, choices: Sorted | Unsorted, activation: Callable) -> jax.Array:
        """x (tokens, D), up (E, F, D) -> activation(up x) (n, F) of x's dtype."""

    def narrow(self, hidden: jax.Array, down: jax.Array, choices: Sorted | Unsorted) -> jax.Array:
        """hidden (n, F), down (E, F, D) -> (n, D) float32, in the order of tokens."""

    def outer(self, hidden: jax.Array, x: jax.Array, choices: Sorted) -> jax.Array:
        """hidden (n, F), x (tokens, D) -> (E, F, D) of x's dtype, each expert's sum over its choices."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped(kernels: Kernels, x, experts, weights, up, down):
    """The chosen experts alone."""
    return _forward(kernels, kernels.choices(experts, up.shape[0]), x, experts, weights, up, down)[0]


def _forward(kernels, choices, x, experts, weights, up, down):
    hidden = kernels.widen(x, up, choices, relu2)
    out = kernels.narrow(hidden, down, choices).reshape(*experts.shape, -1)
    return _present(experts, up, out * weights[..., None]).sum(1), hidden


def _present(experts, up, each):
    """each (tokens, k, ...), but 0 for experts that are not here."""
    here = (experts < up.shape[0]).reshape(experts.shape + (1,) * (each.ndim - 2))
    return jnp.where(here, each, 0)


def _with_residuals(kernels, x, experts, weights, up, down):
    choices = by_expert(experts, up.shape[0])
    y, hidden = _forward(kernels, choices, x, experts, weights, up, down)
    return y, (x, experts, weights, up, down, choices, hidden)


def _gradients(kernels, residuals, dy):
    x, experts, weights, up, down, choices, hidden = residuals
    dy = dy.astype(x.dtype)
    back = kernels.widen(dy, down, choices, lambda z: z).astype(jnp.float32)
    hidden = hidden.astype(jnp.float32)
    each = jnp.zeros(experts.size).at[choices.order].set((hidden * back).sum(-1), unique_indices=True)
    weight = weights.reshape(-1)[choices.order][:, None]
    slope = 2 * jnp.sqrt(hidden)  # of relu(z)^2, which hidden is
    inner = (weight * back * slope).astype(x.dtype)
    dx = kernels.narrow(inner, up, choices).reshape(*experts.shape, -1)
    return (
        _present(experts, up, dx).sum(1).astype(x.dtype),
        None,
        _present(experts, up, each.reshape(experts.shape)),
        kernels.outer(inner, x, choices),
        kernels.outer((weight * hidden).astype(x.dtype), dy, choices),
    )


grouped.defvjp(_with_residuals, _gradients)

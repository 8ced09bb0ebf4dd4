"""One step of a run as a pure function: the loss of a batch, its gradient, the update."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from twotower_jax.config import Config
from twotower_jax.training import objective
from twotower_jax.training.config import TrainingConfig
from twotower_jax.training.data import Batch
from twotower_jax.training.optimizer import balance_experts, make_optimizer


def make_update(config: Config, c: TrainingConfig, dtypes: Any, block_size: int):
    """One step as a pure function.

    Args:
      config: dimensions.
      c: the run.
      dtypes: of compute, for each trained parameter.
      block_size: S.

    Returns:
      (trained, optimiser's state, frozen, batch, step) -> (trained, optimiser's state, metrics), where rows of the
      batch come as (parts, rows, ...). Its noise is a function of the seed and the step.
    """
    optimizer = make_optimizer(c)

    def loss(trained, frozen, batch: Batch, key):
        trained = _cast(trained, dtypes)
        if c.objective == "ar":
            total, weight, loads = objective.ar_loss(config, trained, batch, c.remat)
        else:
            context = frozen if c.objective == "denoise" else trained
            total, weight, loads = objective.denoising_loss(config, c, context, trained, batch, block_size, key)
            if c.objective == "tied":
                more, of, _ = objective.ar_loss(config, trained, batch, c.remat)
                total += more / jnp.maximum(of, 1) * weight
        return total, (weight, loads)

    def update(trained, state, frozen, batch: Batch, step):
        key = jax.random.fold_in(jax.random.key(c.seed), step)

        def part(carry, inputs):
            gradients, total, weight = carry
            batch, key = inputs
            (more, (of, loads)), new = jax.value_and_grad(loss, has_aux=True)(trained, frozen, batch, key)
            return (jax.tree.map(jnp.add, gradients, new), total + more, weight + of), loads

        zero = jnp.zeros((), jnp.float32)
        start = (jax.tree.map(jnp.zeros_like, trained), zero, zero)
        keys = jax.random.split(key, batch.tokens.shape[0])
        (gradients, total, weight), loads = jax.lax.scan(part, start, (batch, keys))
        targets, weight = weight, jnp.maximum(weight, 1)
        gradients = jax.tree.map(lambda g: g / weight, gradients)
        updates, state = optimizer.update(gradients, state, trained)
        trained = optax.apply_updates(trained, updates)
        loads = jax.tree.map(lambda z: z.sum(0), loads)
        if c.objective == "ar" and loads:
            trained = trained | {"tower": balance_experts(trained["tower"], loads, c.router_rate)}
        metrics = {"loss": total / weight, "gradient_norm": optax.tree.norm(gradients), "targets": targets}
        if loads:
            metrics["busiest_expert"] = jnp.stack([z.max() / jnp.maximum(z.mean(), 1e-9) for z in loads.values()]).max()
        return trained, state, metrics

    return update


def _cast(params: Any, like: Any) -> Any:
    """Parameters in the dtypes of compute."""
    return jax.tree.map(lambda p, dtype: p.astype(dtype), params, like)

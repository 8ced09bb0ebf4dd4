"""AdamW with clipping, and a rate that warms up, stays and decays in every stage."""

import jax
import jax.numpy as jnp
import optax

from twotower_jax.training.config import Stage, TrainingConfig


def stage_schedule(stage: Stage) -> optax.Schedule:
    """Warmup-stable-decay over the steps of one stage: its last step has the final rate, if it decays at all."""
    top, end = stage.learning_rate, stage.final_learning_rate
    constant = stage.steps - stage.warmup - stage.decay
    return optax.join_schedules(
        [
            optax.linear_schedule(top / max(stage.warmup, 1), top, max(stage.warmup - 1, 1)),
            optax.constant_schedule(top),
            optax.linear_schedule(top + (end - top) / max(stage.decay, 1), end, max(stage.decay - 1, 1)),
        ],
        [stage.warmup, stage.warmup + constant],
    )


def schedule(c: TrainingConfig) -> optax.Schedule:
    """The learning rate at each step of a run; every stage begins its own anew."""
    ends = [sum(stage.steps for stage in c.stages[: i + 1]) for i in range(len(c.stages) - 1)]
    return optax.join_schedules([stage_schedule(stage) for stage in c.stages], ends)


def make_optimizer(c: TrainingConfig) -> optax.GradientTransformation:
    """Norms, biases, and Mamba's vectors are not decayed, nor are adaLN's tables, whose identity is not 0."""

    def decayed(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.ndim > 1 and path[-1].key not in ("tables", "conv_weight"), params
        )

    return optax.chain(
        optax.clip_by_global_norm(c.clip),
        optax.adamw(schedule(c), c.beta1, c.beta2, weight_decay=c.weight_decay, mask=decayed),
    )


def balance_experts(params: dict, loads: dict[str, jax.Array], rate: float) -> dict:
    """The corrections of a tower's experts moved by `rate` against their load (arXiv 2408.15664): no auxiliary loss.

    Args:
      params: a tower's parameters.
      loads: (E,) for each layer of experts, by its name.
      rate: of the update.
    """
    params = dict(params)
    for name, load in loads.items():
        load = load.astype(jnp.float32)
        mixer = params[name]["mixer"]
        moved = mixer["correction"] + rate * jnp.sign(load.mean() - load)
        params[name] = params[name] | {"mixer": mixer | {"correction": moved}}
    return params

"""Experts that several devices share: tokens are brought to them, or exchanged. No token is dropped."""

import math

import jax
import jax.numpy as jnp

from twotower_jax.config import Config
from twotower_jax.layers.experts import routed

EXCHANGED_TOKENS = 256  # of a device, from which on the exchange's bookkeeping is worth the bytes that it saves
SLACK = 1.25  # room in a round of the exchange, over what an even router would fill


def routed_over_devices(x, experts, weights, up, down, c: Config) -> jax.Array:
    """`routed` for each device's own tokens, by experts that lie on all devices of the axis `expert`.

    Args:
      x: (tokens, D), a device's own.
      experts: (tokens, k) int32, of all E.
      weights: (tokens, k) float32.
      up: (E / devices, F, D), a device's own.
      down: (E / devices, F, D).
      c: the config of one device.

    Returns:
      (tokens, D) float32, not yet summed over `tensor`.
    """
    if c.shards.expert == 1:
        return routed(x, experts, weights, up, down)
    room = round_size(x.shape[0], c)
    if x.shape[0] < EXCHANGED_TOKENS or room >= x.shape[0]:
        return gathered(x, experts, weights, up, down)
    return exchanged(x, experts, weights, up, down, room)


def round_size(tokens: int, c: Config) -> int:
    """Tokens that a device sends to each other one in a round of the exchange."""
    chance = 1 - (1 - 1 / c.shards.expert) ** c.experts_per_token  # that a token has an expert on a certain device
    return math.ceil(tokens * chance * SLACK / 8) * 8


def gathered(x, experts, weights, up, down):
    """All devices get all tokens, and sum what their experts make of them: the least waiting, for few tokens."""
    x, experts, weights = (jax.lax.all_gather(z, "expert", tiled=True) for z in (x, experts, weights))
    local = experts - jax.lax.axis_index("expert") * up.shape[0]
    here = (local >= 0) & (local < up.shape[0])
    y = routed(x, jnp.where(here, local, up.shape[0]), jnp.where(here, weights, 0), up, down)
    return jax.lax.psum_scatter(y, "expert", tiled=True)


def exchanged(x, experts, weights, up, down, room: int):
    """A token goes once to each device that has experts of its choice, and the sum of their outputs comes back.

    In rounds of `room` tokens from each device to each other, as many as the busiest pair needs: one or two, unless the
    router is adversarial.
    """
    tokens, total = x.shape[0], up.shape[0]
    devices = jax.lax.axis_size("expert")
    wanted = (experts[:, None] // total == jnp.arange(devices)[:, None]).any(-1)  # (tokens, devices)
    place = jnp.where(wanted, jnp.cumsum(wanted, axis=0) - 1, -1)
    rounds = -(-jax.lax.pmax(wanted.sum(0).max(), "expert") // room)

    def swap(z):
        return jax.lax.all_to_all(z, "expert", 0, 0)

    def one_round(carry):
        number, y = carry
        slot = place - number * room
        slot = jnp.where((slot >= 0) & (slot < room), slot, room)
        token = jnp.full((devices, room), tokens).at[jnp.arange(devices), slot].set(jnp.arange(tokens)[:, None])
        local = experts.at[token].get(mode="fill", fill_value=-1) - jnp.arange(devices)[:, None, None] * total
        here = (local >= 0) & (local < total)
        sent = (
            x.at[token].get(mode="fill", fill_value=0),
            jnp.where(here, local, total),
            jnp.where(here, weights.at[token].get(mode="fill", fill_value=0), 0),
        )
        arrived = [swap(z).reshape(devices * room, -1) for z in sent]
        back = swap(routed(*arrived, up, down).reshape(devices, room, -1))
        return number + 1, y.at[token].add(back)

    start = (jnp.zeros((), rounds.dtype), jnp.zeros(x.shape, jnp.float32))
    return jax.lax.while_loop(lambda carry: carry[0] < rounds, one_round, start)[1]

"""What is minimised: next-token prediction by a backbone, or the denoiser's prediction of masked tokens.

A loss is a sum and the weight that it is to be divided by, so that the parts of a step can be added up. Besides it
come the experts' loads, (E,) int32 for each layer of experts of the trained tower, by the layer's name.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

from twotower_jax import two_tower
from twotower_jax.config import MOE, Config
from twotower_jax.layers.linear import project
from twotower_jax.state import Packing, TowerState
from twotower_jax.training.config import TrainingConfig
from twotower_jax.training.data import Batch
from twotower_jax.training.noise import draw_masks, draw_times

HEAD_SCORES = 2**26  # float32 logits held at once (256 MiB)


def losses(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log-likelihoods (n,) float32 of targets (n,) given hidden (n, D), head (D, V), in bounded memory."""

    @jax.checkpoint
    def piece(inputs):
        hidden, target = inputs
        logits = project(hidden, head, out=jnp.float32)
        return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]

    size = max(1, HEAD_SCORES // head.shape[1])
    if len(targets) <= size:
        return piece((hidden, targets))
    pad = -len(targets) % size
    pieces = jnp.pad(hidden, [(0, pad), (0, 0)]), jnp.pad(targets, (0, pad))
    split = jax.tree.map(lambda z: z.reshape(-1, size, *z.shape[1:]), pieces)
    return jax.lax.map(piece, split).reshape(-1)[: len(targets)]


def _loads(config: Config, state: TowerState) -> dict[str, jax.Array]:
    return {f"layers_{i}": state.layers[i] for i, kind in enumerate(config.pattern) if kind == MOE}


def ar_loss(config: Config, backbone: dict, batch: Batch, remat: bool) -> tuple[jax.Array, jax.Array, dict]:
    """Next-token prediction within each document.

    Args:
      config: dimensions.
      backbone: {"tower", "head"}.
      batch: rows; its blocks are not used.
      remat: spend less memory, and more time.

    Returns:
      the sum, its weight (the number of targets), and the experts' loads.
    """
    none = jnp.zeros((batch.tokens.shape[0], 1), jnp.int32)
    packing = Packing(batch.segments, none, math.gcd(batch.tokens.shape[1], config.chunk_size))
    hidden, state = two_tower.read_packed(config, backbone["tower"], batch.tokens, packing, remat)
    follows = (batch.segments[:, 1:] == batch.segments[:, :-1]) & batch.targets[:, 1:]
    nll = losses(hidden[:, :-1].reshape(-1, hidden.shape[-1]), backbone["head"], batch.tokens[:, 1:].reshape(-1))
    weight = follows.reshape(-1).astype(jnp.float32)
    return (nll * weight).sum(), weight.sum(), _loads(config, state)


@struct.dataclass
class Noisy:
    """Blocks of a batch, folded into rows, with noise.

    Attributes:
      clean: (B M, S) int32.
      noisy: the same with the mask's id where masked.
      masked: (B M, S) bool; none in a block that is only there to fill the array.
      t: (B M,) float32, the share of the block that is masked, as decoding gives it.
      drawn_t: (B M,) float32, the probability that masks were drawn with.
    """

    clean: jax.Array
    noisy: jax.Array
    masked: jax.Array
    t: jax.Array
    drawn_t: jax.Array


def add_noise(c: TrainingConfig, batch: Batch, size: int, key: jax.Array) -> Noisy:
    """The blocks of a batch with noise from a key."""
    times, masks = jax.random.split(key)
    t = draw_times(times, batch.blocks.shape, c.times)
    masked = draw_masks(masks, t, size) & (batch.blocks >= 0)[..., None]
    positions = jnp.maximum(batch.blocks, 0)[..., None] + jnp.arange(size)
    clean = jnp.take_along_axis(batch.tokens[:, None], positions, axis=-1)
    clean, masked, t = (z.reshape(-1, *z.shape[2:]) for z in (clean, masked, t))
    noisy = jnp.where(masked, c.mask_token_id, clean)
    return Noisy(clean, noisy, masked, masked.mean(-1, dtype=jnp.float32), t)


def denoising_loss(
    config: Config, c: TrainingConfig, context: dict, denoiser: dict, batch: Batch, size: int, key: jax.Array
) -> tuple[jax.Array, jax.Array, dict]:
    """The mean negative log-likelihood of masked tokens, all blocks of all rows in one pass (paper, training).

    Args:
      config: dimensions.
      c: the run.
      context: {"tower", "head"} of the context tower, of which no gradient is taken unless it is trained as well.
      denoiser: {"tower", "head", "time"}.
      batch: rows.
      size: S.
      key: of the noise.

    Returns:
      the sum, its weight, and the experts' loads. With `elbo_weight` a block counts by 1 / max(t, 1 / S) over S; the
      bound is there because a block has one mask at least.
    """
    noise = add_noise(c, batch, size, key)
    packing = Packing(batch.segments, jnp.maximum(batch.blocks, 0), size)
    _, state = two_tower.read_packed(config, context["tower"], batch.tokens, packing, c.remat)
    hidden, after = two_tower.denoiser_hidden(
        config, denoiser, state, noise.noisy, noise.t, count_experts=True, remat=c.remat
    )
    nll = losses(hidden.reshape(-1, hidden.shape[-1]), denoiser["head"], noise.clean.reshape(-1))
    nll = nll.reshape(noise.masked.shape)
    weight = noise.masked.astype(jnp.float32)
    if c.elbo_weight:
        total = (nll * weight / jnp.maximum(noise.drawn_t, 1 / size)[:, None]).sum()
        count = (noise.masked.any(-1) * float(size)).sum()
    else:
        total, count = (nll * weight).sum(), weight.sum()
    if c.ar_weight:
        more, of = mock_ar_loss(config, c, context, denoiser, batch, state, noise, jax.random.fold_in(key, 1))
        total += c.ar_weight * more / jnp.maximum(of, 1) * count
    return total, count, _loads(config, after)


def mock_ar_loss(
    config: Config,
    c: TrainingConfig,
    context: dict,
    denoiser: dict,
    batch: Batch,
    state: TowerState,
    noise: Noisy,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Next-token prediction as mock-AR decodes: one token of each block, given the context tower's state before it.

    A completion's first token is not among what is predicted: the prompt before it is in no block.

    Args:
      config: dimensions.
      c: the run.
      context: {"tower", ...} of the context tower.
      denoiser: {"tower", "head", ...}.
      batch: rows.
      state: before each of their blocks.
      noise: the blocks, of which the clean tokens are read.
      key: of the choice of a token within each block.

    Returns:
      the sum and its weight, the number of tokens.
    """
    blocks, size = noise.clean.shape
    offset = jax.random.randint(key, (blocks,), 0, size)
    before = two_tower.advance(config, context["tower"], state, noise.clean, offset, c.remat)
    token = jnp.take_along_axis(noise.clean, offset[:, None], axis=1)
    hidden, _ = two_tower.denoiser_hidden(config, denoiser, before, token, None, causal=True, remat=c.remat)

    rows, length = batch.tokens.shape
    row = jnp.repeat(jnp.arange(rows), blocks // rows)
    follows = jnp.minimum(before.length + 1, length - 1)
    inside = (before.length + 1 < length) & (batch.segments[row, follows] == batch.segments[row, before.length])
    weight = (inside & noise.masked.any(-1)).astype(jnp.float32)
    nll = losses(hidden[:, 0], denoiser["head"], batch.tokens[row, follows])
    return (nll * weight).sum(), weight.sum()

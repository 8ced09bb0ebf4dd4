"""What the devices do in a round: read prompts, fill slots, write.

Each function is a program's, on one device's part of the rows; rows move from a device's bench to its own slots alone.
"""

from typing import Any

import jax
import jax.numpy as jnp

from twotower_jax import two_tower
from twotower_jax.config import Config
from twotower_jax.decoding.diffusion import Block, Diffusion, denoise_step, masked_block
from twotower_jax.decoding.loop import when
from twotower_jax.decoding.stopping import broken
from twotower_jax.decoding.vocabulary import Vocabulary
from twotower_jax.engine.rows import EMPTY, Bench, News, Rows, Slots
from twotower_jax.layers.collectives import any_row, row_sum
from twotower_jax.state import TowerState


def feed(
    config: Config,
    params: dict,
    bench: Bench,
    new: Rows,
    fresh: jax.Array,
    tokens: jax.Array,
    count: jax.Array,
    ready: jax.Array,
) -> Bench:
    """The context tower reads a piece of each prompt on the bench.

    Args:
      config: dimensions.
      params: parameters of the context tower.
      bench: before.
      new: rows that come to the bench, where `fresh` (R,) is set.
      fresh: (R,) bool.
      tokens: (R, C) int32, of which `count` (R,) are read.
      count: (R,) int32.
      ready: (R,) bool, rows whose prompt ends with this piece.
    """
    with jax.named_scope("feed"):
        rows = _chosen(fresh, new, bench.rows)
        # All of it: a value that was not finite would live on under a mask.
        state = _chosen(fresh, jax.tree.map(jnp.zeros_like, bench.state), bench.state)
        _, state = two_tower.extend(config, params, state, tokens, count)
        return Bench(rows, (bench.waiting & ~fresh) | ready, state)


def seat(config: Config, bench: Bench, slots: Slots, cancelled: jax.Array) -> tuple[Bench, Slots]:
    """Rows that wait go to slots that are empty, the oldest first.

    Args:
      config: dimensions.
      bench: the rows that wait among them keep their places, without waiting.
      slots: before.
      cancelled: (n,) int32, tickets of rows that end here.
    """
    with jax.named_scope("seat"):
        kept = (slots.rows.ticket[:, None] != cancelled).all(-1)
        tickets = jnp.where(kept, slots.rows.ticket, EMPTY)
        slots = slots.replace(rows=slots.rows.replace(ticket=tickets))
        waiting = bench.waiting & (bench.rows.ticket[:, None] != cancelled).all(-1)
        empty, places = slots.rows.ticket == EMPTY, jnp.argsort(slots.rows.ticket != EMPTY, stable=True)
        older = waiting & (bench.rows.ticket < bench.rows.ticket[:, None])
        rank = older.sum(-1)  # of the row, among those that wait
        seated = waiting & (rank < empty.sum())
        target = jnp.where(seated, places[jnp.minimum(rank, places.shape[0] - 1)], places.shape[0])

        def put(slots: tuple) -> tuple:
            source = (bench.rows, bench.state)
            return jax.tree.map(lambda old, new: old.at[target].set(new, mode="drop"), slots, source)

        rows, state = when(seated.any(), put, (slots.rows, slots.state))
        begun = slots.begun.at[target].set(False, mode="drop") & kept
        return bench.replace(waiting=waiting & ~seated), slots.replace(rows=rows, state=state, begun=begun)


def denoise(config: Config, params: dict, slots: Slots, share: jax.Array, mask_id: jax.Array) -> tuple[Slots, News]:
    """Denoises until enough rows have a full block; the context tower reads these.

    Args:
      config: dimensions.
      params: parameters of both towers.
      slots: before.
      share: () float32 of the rows that are denoised is enough.
      mask_id: () int32, the token that stands for a masked position.
    """
    rows, width = slots.rows, slots.block.tokens.shape[1]
    own = rows.of_mode("diffusion")
    rules = Diffusion(rows.sampler, rows.unmasking, mask_id, width)
    begins = own & ~slots.begun
    block = _chosen(begins, masked_block(rules, begins, rows.size), slots.block)
    block = block.replace(masked=block.masked & own[:, None])
    keys = rows.keys(width)
    enough = jnp.ceil(share * row_sum(own, config))

    def full(block: Block) -> jax.Array:
        return own & ~block.masked.any(-1)

    def more(block: Block) -> jax.Array:
        return any_row(block.masked, config) & (row_sum(full(block), config) < enough)

    block = jax.lax.while_loop(more, lambda block: denoise_step(config, params, rules, slots.state, block, keys), block)
    done = full(block)
    failed = done & block.failed
    stops = (rows.ends(block.tokens) & block.real).any(-1)
    ended = done & (failed | stops | (rows.written + rows.size >= rows.limit))
    news = News(
        ticket=rows.ticket,
        tokens=block.tokens,
        probability=block.confidence,
        count=jnp.where(done & ~failed, rows.size, 0),
        forwards=jnp.where(done, block.step, 0),
        ended=ended,
        failed=failed,
    )
    goes_on = done & ~ended

    def read(state: TowerState) -> TowerState:
        with jax.named_scope("commit"):
            return two_tower.extend(config, params, state, block.tokens, jnp.where(goes_on, rows.size, 0))[1]

    state = when(any_row(goes_on, config), read, slots.state)
    rows = rows.replace(
        ticket=jnp.where(ended, EMPTY, rows.ticket), written=rows.written + jnp.where(goes_on, rows.size, 0)
    )
    return Slots(rows, state, block, (slots.begun | own) & ~done), news


def write(
    config: Config,
    params: dict,
    slots: Slots,
    share: jax.Array,
    *,
    mode: str,
    tokens: int,
) -> tuple[Slots, News]:
    """Rows of `ar` or `mock-ar` write so many tokens, one at a time, or until enough of them have ended.

    Args:
      config: dimensions.
      params: parameters of both towers, or of a backbone's.
      slots: before.
      share: () float32 of the rows is enough.
      mode: which of the two.
      tokens: that are written at most.
    """
    own, vocabulary = slots.rows.of_mode(mode), Vocabulary(config.shards.tensor)
    shape = (own.shape[0], tokens)
    none, no = jnp.zeros(shape[0], jnp.int32), jnp.zeros(shape[0], bool)
    news = News(slots.rows.ticket, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32), none, none, no, no)
    enough = jnp.ceil(share * row_sum(own, config))

    def more(carry: tuple) -> jax.Array:
        turn, _, _, news = carry
        going = any_row(own & ~news.ended, config)
        return (turn < tokens) & going & (row_sum(news.ended, config) < enough)

    def token(carry: tuple) -> tuple:
        turn, rows, state, news = carry
        active = own & ~news.ended
        logits, state = _next_logits(config, params, state, rows.last, active, mode)
        drawn = rows.sampler.predict(logits, rows.keys(1), vocabulary)
        failed = active & broken(logits, vocabulary)
        fine = active & ~failed
        ended = fine & (rows.ends(drawn)[:, 0] | (rows.written + 1 >= rows.limit))

        def put(into: jax.Array, column: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(into, column, turn, axis=1)

        news = News(
            ticket=news.ticket,
            tokens=put(news.tokens, drawn),
            probability=put(news.probability, vocabulary.probability(logits, drawn)),
            count=news.count + fine,
            forwards=news.forwards + active,
            ended=news.ended | failed | ended,
            failed=news.failed | failed,
        )
        rows = rows.replace(last=jnp.where(fine, drawn[:, 0], rows.last), written=rows.written + fine)
        return turn + 1, rows, state, news

    _, rows, state, news = jax.lax.while_loop(more, token, (0, slots.rows, slots.state, news))
    rows = rows.replace(ticket=jnp.where(news.ended, EMPTY, rows.ticket))
    return slots.replace(rows=rows, state=state), news


def _next_logits(
    config: Config, params: dict, state: TowerState, last: jax.Array, active: jax.Array, mode: str
) -> tuple[jax.Array, TowerState]:
    """The logits (B, 1, V) of what follows the last token, which the context tower reads too."""
    hidden, after = two_tower.extend(config, params, state, last[:, None], active.astype(jnp.int32))
    if mode == "ar":
        return two_tower.context_head(params, hidden), after
    return two_tower.denoise(config, params, state, last[:, None], t=None), after


def _chosen(rows: jax.Array, one: Any, other: Any) -> Any:
    """Of each array (n, ...) the marked rows of one, the other rows of the other."""
    return jax.tree.map(lambda x, y: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y), one, other)

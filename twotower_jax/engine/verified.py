"""Verified decoding: the denoiser drafts a block; the context tower's one pass over it says what AR would have written.

A row's block begins with its last token, which is not read yet; the draft is what follows. The pass gives AR's token
after each position. Drafts are accepted as far as they are these, and AR's token after them is the row's last one: a
pass writes one token or more, and what is written is what AR writes.
"""

from typing import Any

import jax
import jax.numpy as jnp

from twotower_jax import two_tower
from twotower_jax.config import Config
from twotower_jax.decoding.block import masked_block
from twotower_jax.decoding.diffusion import Diffusion
from twotower_jax.decoding.drafting import Drafting
from twotower_jax.decoding.vocabulary import Vocabulary
from twotower_jax.engine.rows import EMPTY, Kinds, News, Rows, Slots
from twotower_jax.engine.steps import filled, no_news, when
from twotower_jax.layers.collectives import any_row
from twotower_jax.state import TowerState


def draft(
    config: Config, params: dict, slots: Slots, share: jax.Array, mask_id: jax.Array, *, kinds: Kinds, most: int
) -> tuple[Slots, jax.Array, jax.Array]:
    """Drafts blocks until enough rows have a full one; arguments as for `steps.denoise`.

    A position draws with the key of the token that it stands for, as the verifier will: where both towers' logits are
    alike, so are the tokens.

    Returns:
      the slots, with their state as it was; and of each row, (B,) int32, how many positions are to be verified, and
      the passes that their draft took.
    """
    rows, width = slots.rows, slots.block.tokens.shape[1]
    own = rows.of_mode("verified")
    pays, begins, starts = rows.steps == 0, rows.written == 0, own & ~slots.begun
    held = ~begins[:, None] & (slots.held != EMPTY)
    history = slots.history.after(starts, begins, rows.written, slots.block.size)
    unmasking = rows.unmasking(kinds).replace(steps=jnp.where(pays, width, rows.steps))
    drafting = Drafting(unmasking, pays, history.gain, rows.ends)
    rules = Diffusion(rows.sampler(kinds), drafting, mask_id)
    # The first token is AR's: drafts begin where an answer does.
    none = begins | (pays & ~history.worth_drafting & ~held.any(1))
    fresh = masked_block(starts, jnp.where(none, 1, rows.size), width, mask_id)
    fresh = fresh.replace(
        tokens=jnp.where(held, slots.held, fresh.tokens).at[:, 0].set(rows.last),
        masked=(fresh.masked & ~held.any(1, keepdims=True)).at[:, 0].set(False),
        confidence=fresh.confidence.at[:, 0].set(1),
    )
    block, done = filled(config, params, rules, slots, own, fresh, rows.keys(width, last=True), share, most)
    history = history.replace(gain=drafting.learned(block, own & done))
    slots = slots.replace(block=block, begun=(slots.begun | own) & ~done, history=history)
    return slots, jnp.where(done, block.size, 0), jnp.where(done, block.step, 0)


def verify(
    config: Config,
    params: dict,
    slots: Slots,
    tokens: jax.Array,
    count: jax.Array,
    passes: jax.Array,
    *,
    kinds: Kinds,
    most: int,
) -> tuple[Slots, News, jax.Array]:
    """The context tower reads drafts, and keeps what AR would have written.

    Args:
      config: dimensions.
      params: parameters of the context tower.
      slots: before.
      tokens: (B, S) int32, each row's last token and what is drafted after it.
      count: (B,) int32, positions to be verified, 0 but for `most` rows.
      passes: (B,) int32, that the drafts took.
      kinds: what rows may ask.
      most: see `steps.read`.

    Returns:
      the slots; the news; and the numbers of the rows that were read, (most,).
    """
    (chosen,) = jnp.nonzero(count > 0, size=most, fill_value=count.shape[0])
    n = jnp.where(chosen < count.shape[0], _of(chosen, count), 0)

    def put(into: Any, new: Any) -> Any:
        return jax.tree.map(lambda x, y: x.at[chosen].set(y, mode="drop"), into, new)

    def checked(carry: tuple) -> tuple:
        rows, news, state, held = carry
        before, mine, drafted = _of(chosen, (state, rows, tokens))
        with jax.named_scope("verify"):
            hidden, probed = two_tower.probe(config, params, before, drafted, n)
            logits = two_tower.context_head(params, hidden)
            kept, found, right = _judged(config, mine, drafted, n, logits, kinds)
            found = found.replace(forwards=jnp.where(n > 0, _of(chosen, passes), 0))
            changed = two_tower.news(two_tower.settle(before, probed, kept), before.length, tokens.shape[1])
        last = jnp.take_along_axis(found.tokens, jnp.maximum(kept - 1, 0)[:, None], axis=1)[:, 0]
        mine = mine.replace(ticket=jnp.where(found.ended, EMPTY, mine.ticket), last=last, written=mine.written + kept)
        return put(rows, mine), put(news, found), two_tower.absorb(state, changed, chosen), put(held, right)

    start = (slots.rows, no_news(slots.rows.ticket, tokens.shape[1]), slots.state, slots.held)
    rows, news, state, held = when(any_row(count > 0, config), checked, start)
    return slots.replace(rows=rows, state=state, held=held), news, chosen


def verify_apart(
    config: Config, params: dict, slots: Slots, told: tuple, *, kinds: Kinds, most: int
) -> tuple[Slots, News, jax.Array, tuple, TowerState]:
    """`verify` of what the denoiser's devices sent: tokens, count, passes and the tickets (B,) there.

    Returns:
      the slots and the news; and for `heed` the numbers of the rows that were read, these rows and what is held for
      them, and what is new in their state.
    """
    *drafts, ticket = told
    before = slots.state.length
    slots = slots.replace(rows=slots.rows.replace(ticket=ticket))
    slots, news, chosen = verify(config, params, slots, *drafts, kinds=kinds, most=most)
    found, state, before = _of(chosen, ((slots.rows, slots.held), slots.state, before))
    return slots, news, chosen, found, two_tower.news(state, before, drafts[0].shape[1])


def heed(config: Config, slots: Slots, chosen: jax.Array, found: tuple, came: TowerState) -> Slots:
    """What `verify_apart` found, on the denoiser's devices."""
    own = (slots.rows, slots.held)
    rows, held = jax.tree.map(lambda x, y: x.at[chosen].set(y, mode="drop"), own, found)
    return slots.replace(rows=rows, held=held, state=two_tower.absorb(slots.state, came, chosen))


def _judged(
    config: Config, rows: Rows, drafted: jax.Array, count: jax.Array, logits: jax.Array, kinds: Kinds
) -> tuple[jax.Array, News, jax.Array]:
    """How many positions of each row's block are kept, (n,), what is written: as many tokens, and what is held (n, S).

    Args:
      config: dimensions.
      rows: the rows.
      drafted: (n, S) int32, the block.
      count: (n,) int32, its positions.
      logits: (n, S, V) float32, after each.
      kinds: see `verify`.
    """
    vocabulary, width = Vocabulary(config.shards.tensor), drafted.shape[1]
    wanted = rows.sampler(kinds).predict(logits, rows.keys(width), vocabulary)
    after = jnp.pad(drafted[:, 1:], [(0, 0), (0, 1)])
    likely = vocabulary.probability(logits, after) >= rows.accept[:, None]
    place = jnp.arange(width)
    agree = ((after == wanted) | likely) & (place + 1 < count[:, None])
    accepted = jnp.cumprod(agree, axis=1).sum(1)
    tokens = jnp.where(place < accepted[:, None], after, wanted)
    kept = jnp.minimum(accepted + (count > 0), rows.limit - rows.written)
    stops = rows.ends(tokens)
    kept = jnp.minimum(kept, jnp.where(stops.any(1), jnp.argmax(stops, axis=1) + 1, width))
    bad = vocabulary.any(~jnp.isfinite(logits)) & (place < kept[:, None])
    failed = bad.any(1)
    kept = jnp.where(failed, jnp.argmax(bad, axis=1), kept)
    stopped = (stops & (place < kept[:, None])).any(1)
    news = News(
        ticket=rows.ticket,
        tokens=tokens,
        probability=vocabulary.probability(logits, tokens),
        count=kept,
        forwards=jnp.zeros_like(count),
        ended=(count > 0) & (failed | stopped | (rows.written + kept >= rows.limit)),
        failed=failed,
    )
    return kept, news, _held(rows, jnp.where(agree, after, EMPTY), kept)


def _held(rows: Rows, right: jax.Array, kept: jax.Array) -> jax.Array:
    """See `Slots.held`; `right` is (n, S), what is drafted after each position if AR, had the draft been right so far,
    would have written it too, EMPTY elsewhere.
    """
    width = right.shape[1]
    place = jnp.arange(width)
    there = kept[:, None] + place - 1
    moved = jnp.where((place > 0) & (there < width), jnp.take_along_axis(right, there, axis=1, mode="clip"), EMPTY)
    ends = rows.ends(moved) & (moved != EMPTY)
    until = (jnp.cumsum(ends, axis=1) - ends == 0) & (place > 0)
    whole = ends.any(1) & ~(until & (moved == EMPTY)).any(1)
    return jnp.where(until & whole[:, None], moved, EMPTY)


def _of(rows: jax.Array, tree: Any) -> Any:
    """Some rows (n,) of all arrays; a number beyond the last is the last."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0, mode="clip"), tree)


def draft_and_verify(
    config: Config, params: dict, slots: Slots, share: jax.Array, mask_id: jax.Array, *, kinds: Kinds, most: int
) -> tuple[Slots, News]:
    """`draft`, and `verify` of the blocks that are full."""
    slots, *drafts = draft(config, params, slots, share, mask_id, kinds=kinds, most=most)
    slots, news, _ = verify(config, params, slots, slots.block.tokens, *drafts, kinds=kinds, most=most)
    return slots, news

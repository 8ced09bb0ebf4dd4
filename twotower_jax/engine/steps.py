"""What the devices do in a round: read prompts, fill slots, write.

Each function is a program's, on one device's part of the rows; rows move from a device's bench to its own slots alone.
Where the towers have devices of their own, both have a bench and slots, and seat alike; what is new in the context's
state goes to the denoiser's copy.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from twotower_jax import two_tower
from twotower_jax.config import Config
from twotower_jax.decoding.block import Block, masked_block
from twotower_jax.decoding.diffusion import Diffusion, denoise_step
from twotower_jax.decoding.vocabulary import Vocabulary
from twotower_jax.engine.rows import EMPTY, Bench, Kinds, News, Piece, Rows, Slots
from twotower_jax.layers.collectives import any_row, row_sum
from twotower_jax.state import KVCache, TowerState


def feed(config: Config, params: dict, bench: Bench, piece: Piece, prefix: TowerState | None) -> Bench:
    """The context tower reads a piece of each prompt on the bench; `prefix` is the state, of one row, that prompts of
    which it is known begin with.
    """
    with jax.named_scope("feed"):
        return _read_on(config, params, _welcomed(bench, piece, prefix), piece)


def _read_on(config: Config, params: dict, bench: Bench, piece: Piece) -> Bench:
    return bench.replace(state=two_tower.extend(config, params, bench.state, piece.tokens, piece.count)[1])


def _welcomed(bench: Bench, piece: Piece, prefix: TowerState | None) -> Bench:
    # All of the state: a value that was not finite would live on under a mask.
    state = _chosen(piece.fresh, jax.tree.map(jnp.zeros_like, bench.state), bench.state)
    if prefix is not None:
        state = _chosen(piece.known, _stretched(prefix, state), state)
    waiting = (bench.waiting & ~piece.fresh) | piece.ready
    return Bench(_chosen(piece.fresh, piece.rows, bench.rows), waiting, state)


def _stretched(prefix: TowerState, state: TowerState) -> TowerState:
    """A row's state with as many positions as another state has."""

    def one(short: jax.Array, long: jax.Array) -> jax.Array:
        return jnp.pad(short, [(0, 0), *[(0, n - m) for m, n in zip(short.shape[1:], long.shape[1:], strict=True)]])

    return jax.tree.map(one, prefix, state)


def remember(config: Config, bench: Bench, *, positions: int) -> TowerState:
    """The state of the bench's first row, with so many positions."""

    def first(layer: Any) -> Any:
        own = jax.tree.map(lambda x: x[:1], layer)
        return jax.tree.map(lambda x: x[:, :, :positions], own) if isinstance(layer, KVCache) else own

    return TowerState(tuple(map(first, bench.state.layers)), bench.state.length[:1])


def feed_apart(
    config: Config, params: dict, bench: Bench, piece: Piece, prefix: TowerState | None
) -> tuple[Bench, TowerState]:
    """`feed`, and what is new in the context's state."""
    with jax.named_scope("feed"):
        bench = _welcomed(bench, piece, prefix)
        before = bench.state.length
        bench = _read_on(config, params, bench, piece)
        return bench, two_tower.news(bench.state, before, piece.tokens.shape[1])


def follow(config: Config, bench: Bench, piece: Piece, came: TowerState, prefix: TowerState | None) -> Bench:
    """What `feed_apart` did, on the denoiser's devices."""
    bench = _welcomed(bench, piece, prefix)
    rows = jnp.arange(bench.waiting.shape[0])
    return bench.replace(state=two_tower.absorb(bench.state, came, rows))


def when(condition: jax.Array, change: Callable, value: Any) -> Any:
    """`change(value)` if the condition holds: a loop of one turn or none, which works in place where `cond` copies."""
    return jax.lax.while_loop(lambda c: c[0], lambda c: (jnp.array(False), change(c[1])), (condition, value))[1]


def seat(config: Config, bench: Bench, slots: Slots, cancelled: jax.Array) -> tuple[Bench, Slots]:
    """Rows that wait go to slots that are empty, the oldest first.

    Args:
      config: dimensions.
      bench: before; rows that are seated do not wait any more.
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


def denoise(
    config: Config, params: dict, slots: Slots, share: jax.Array, mask_id: jax.Array, *, kinds: Kinds, most: int
) -> tuple[Slots, News, jax.Array]:
    """Denoises until enough rows have a full block.

    Args:
      config: dimensions.
      params: parameters of the denoiser.
      slots: before.
      share: () float32 of the rows that are denoised is enough.
      mask_id: () int32, the token that stands for a masked position.
      kinds: what rows may ask.
      most: full blocks of a device that end with this round; others wait for the next, in which they come first.

    Returns:
      the slots, with their state as it was; the news; and how much of its block the context tower reads of each row,
      (B,) int32.
    """
    rows, width = slots.rows, slots.block.tokens.shape[1]
    own = rows.of_mode("diffusion")
    rules = Diffusion(rows.sampler(kinds), rows.unmasking(kinds), mask_id)
    fresh = masked_block(own & ~slots.begun, rows.size, width, mask_id)
    block, done = filled(config, params, rules, slots, own, fresh, rows.keys(width), share, most)
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
    reads = jnp.where(done & ~ended, rows.size, 0)
    rows = rows.replace(ticket=jnp.where(ended, EMPTY, rows.ticket), written=rows.written + reads)
    return slots.replace(rows=rows, block=block, begun=(slots.begun | own) & ~done), news, reads


def filled(
    config: Config,
    params: dict,
    rules: Diffusion,
    slots: Slots,
    own: jax.Array,
    fresh: Block,
    keys: jax.Array,
    share: jax.Array,
    most: int,
) -> tuple[Block, jax.Array]:
    """The blocks of some rows, `own` (B,), denoised until enough of them are full; and which of these are done with it.

    Args:
      config, params, share, most: see `denoise`.
      rules: of the blocks.
      slots: before.
      own: the rows.
      fresh: blocks for the rows that have not begun one.
      keys: (B, S), see `denoise_step`.
    """
    block = _chosen(own & ~slots.begun, fresh, slots.block)
    masked = block.masked
    block = block.replace(masked=masked & own[:, None])
    enough = jnp.ceil(share * row_sum(own, config))

    def full(block: Block) -> jax.Array:
        return own & ~block.masked.any(-1)

    def more(block: Block) -> jax.Array:
        return any_row(block.masked, config) & (row_sum(full(block), config) < enough)

    waited = full(block)
    block = jax.lax.while_loop(more, lambda block: denoise_step(config, params, rules, slots.state, block, keys), block)
    block = block.replace(masked=jnp.where(own[:, None], block.masked, masked))
    done = full(block)
    order = jnp.argsort(jnp.where(waited, 0, jnp.where(done, 1, 2)), stable=True)
    return block, done & (jnp.argsort(order) < most)


def read(
    config: Config, params: dict, state: TowerState, tokens: jax.Array, count: jax.Array, most: int
) -> tuple[TowerState, jax.Array]:
    """The context tower reads so many (B,) of the tokens (B, n) of each row, which is 0 but for `most` of them.

    Returns:
      the state, and the numbers of the rows that were read, (most,): B where there are fewer.
    """
    (rows,) = jnp.nonzero(count > 0, size=most, fill_value=count.shape[0])

    def extended(state: TowerState) -> TowerState:
        with jax.named_scope("commit"):
            if most == count.shape[0]:
                return two_tower.extend(config, params, state, tokens, count)[1]
            own, some, n = jax.tree.map(lambda x: jnp.take(x, rows, axis=0, mode="clip"), (state, tokens, count))
            _, after = two_tower.extend(config, params, own, some, n)
            return two_tower.absorb(state, two_tower.news(after, own.length, some.shape[1]), rows)

    return when(any_row(count > 0, config), extended, state), rows


def denoise_and_read(
    config: Config, params: dict, slots: Slots, share: jax.Array, mask_id: jax.Array, *, kinds: Kinds, most: int
) -> tuple[Slots, News]:
    """`denoise`, and `read` of the blocks that are full."""
    slots, news, reads = denoise(config, params, slots, share, mask_id, kinds=kinds, most=most)
    state, _ = read(config, params, slots.state, slots.block.tokens, reads, most)
    return slots.replace(state=state), news


def write(
    config: Config, params: dict, slots: Slots, share: jax.Array, *, mode: str, tokens: int, kinds: Kinds
) -> tuple[Slots, News]:
    """Rows of `ar` or `mock-ar` write so many tokens, one at a time, or until enough of them have ended.

    Args:
      config: dimensions.
      params: parameters of both towers; for `ar` the context tower's alone will do.
      slots: before.
      share: () float32 of the rows is enough.
      mode: which of the two.
      tokens: that are written at most.
      kinds: what rows may ask.
    """
    own = slots.rows.of_mode(mode)
    enough = jnp.ceil(share * row_sum(own, config))

    def more(carry: tuple) -> jax.Array:
        turn, _, _, news = carry
        going = any_row(own & ~news.ended, config)
        return (turn < tokens) & going & (row_sum(news.ended, config) < enough)

    def token(carry: tuple) -> tuple:
        turn, rows, state, news = carry
        active = own & ~news.ended
        logits, state = _next_logits(config, params, state, rows.last, active, mode)
        rows, news = _add(config, rows, news, logits, active, turn, kinds)
        return turn + 1, rows, state, news

    _, rows, state, news = jax.lax.while_loop(
        more, token, (0, slots.rows, slots.state, no_news(slots.rows.ticket, tokens))
    )
    return slots.replace(rows=_left(rows, news), state=state), news


def write_apart(
    config: Config, params: dict, slots: Slots, *, kinds: Kinds
) -> tuple[Slots, News, jax.Array, jax.Array]:
    """The denoiser writes one token of the rows of `mock-ar`.

    Returns:
      the slots and the news, and for `read` the tokens before those (B, 1) and how many are read of each row (B,).
    """
    active, last = slots.rows.of_mode("mock-ar"), slots.rows.last[:, None]
    logits = two_tower.denoise(config, params, slots.state, last, t=None)
    rows, news = _add(config, slots.rows, no_news(slots.rows.ticket, 1), logits, active, 0, kinds)
    return slots.replace(rows=_left(rows, news)), news, last, (active & ~news.ended).astype(jnp.int32)


def no_news(ticket: jax.Array, tokens: int) -> News:
    shape = (ticket.shape[0], tokens)
    none, no = jnp.zeros(shape[0], jnp.int32), jnp.zeros(shape[0], bool)
    return News(ticket, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32), none, none, no, no)


def _add(
    config: Config, rows: Rows, news: News, logits: jax.Array, active: jax.Array, turn: jax.Array | int, kinds: Kinds
) -> tuple[Rows, News]:
    """With the next token of the active rows, drawn from logits (B, 1, V), at a place of the news."""
    vocabulary = Vocabulary(config.shards.tensor)
    drawn = rows.sampler(kinds).predict(logits, rows.keys(1), vocabulary)
    failed = active & vocabulary.broken(logits)
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
    return rows.replace(last=jnp.where(fine, drawn[:, 0], rows.last), written=rows.written + fine), news


def _left(rows: Rows, news: News) -> Rows:
    """Without the rows that have ended."""
    return rows.replace(ticket=jnp.where(news.ended, EMPTY, rows.ticket))


def read_apart(
    config: Config, params: dict, slots: Slots, tokens: jax.Array, count: jax.Array, ticket: jax.Array, *, most: int
) -> tuple[Slots, jax.Array, TowerState]:
    """`read` of what the denoiser's devices sent, with the tickets (B,) there.

    Returns:
      the slots; and of the rows that were read, `most` or fewer, their numbers (most,), B where there are fewer, and
      what is new in their state.
    """
    before = slots.state.length
    state, rows = read(config, params, slots.state, tokens, count, most)
    slots = slots.replace(state=state, rows=slots.rows.replace(ticket=ticket))
    own, before = jax.tree.map(lambda x: jnp.take(x, rows, axis=0, mode="clip"), (state, before))
    return slots, rows, two_tower.news(own, before, tokens.shape[1])


def absorb(config: Config, slots: Slots, rows: jax.Array, came: TowerState) -> Slots:
    """What `read_apart` found new, in the denoiser's copy."""
    return slots.replace(state=two_tower.absorb(slots.state, came, rows))


def release(config: Config, slots: Slots, ticket: jax.Array) -> Slots:
    """The rows that are left (B,) where the context tower wrote alone."""
    return slots.replace(rows=slots.rows.replace(ticket=ticket))


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

"""One token a step: by the context tower (AR), or by the denoiser without time conditioning (mock-AR)."""

import jax
import jax.numpy as jnp
from flax import struct

from twotower_jax import two_tower
from twotower_jax.config import Config
from twotower_jax.decoding.progress import Progress, Request, nothing_written
from twotower_jax.decoding.sampling import Sampler
from twotower_jax.decoding.stopping import broken, holds
from twotower_jax.decoding.vocabulary import Vocabulary
from twotower_jax.layers.collectives import any_row
from twotower_jax.state import TowerState


def append(config: Config, sampler: Sampler, p: Progress, request: Request, logits: jax.Array) -> Progress:
    """Draws the next token of every row from its logits (B, V)."""
    vocabulary, logits = Vocabulary(config.shards.tensor), logits[:, None]
    token = sampler.predict(logits, request.keys(p.unit, 1), vocabulary)
    active = ~p.done
    return p.add(token, active.astype(jnp.int32), active & broken(logits, vocabulary), holds(token, request.eos))


def newest(p: Progress) -> jax.Array:
    """The last token that each row drew, (B, 1)."""
    return jax.lax.dynamic_slice_in_dim(p.tokens, p.unit - 1, 1, axis=1)


def generate(config: Config, params: dict, sampler: Sampler, request: Request, *, capacity: int, room: int) -> Progress:
    """The context tower alone, until every row has ended or `request.units` tokens are written; see `loop.generate`."""
    hidden, state = two_tower.prefill(config, params, request.prompts, request.count, capacity)
    p = nothing_written(request.count.shape[0], room)

    def token(carry: tuple[TowerState, Progress]) -> tuple[TowerState, Progress]:
        state, p = carry
        hidden, state = two_tower.extend(config, params, state, newest(p), (~p.done).astype(jnp.int32))
        return state, append(config, sampler, p, request, two_tower.context_head(params, hidden[:, 0]))

    def more(carry: tuple[TowerState, Progress]) -> jax.Array:
        return (carry[1].unit < request.units) & any_row(~carry[1].done, config)

    first = append(config, sampler, p, request, two_tower.context_head(params, hidden))
    return jax.lax.while_loop(more, token, (state, first))[1]


@struct.dataclass
class MockAR:
    """The denoiser reads the last token with the context from before it, and writes the next.

    Attributes:
      sampler: how a token is predicted.
    """

    sampler: Sampler

    @property
    def unit(self) -> int:
        """New tokens that one call of `write` gives a row."""
        return 1

    def read_before(self, request: Request) -> jax.Array:
        """How much of each prompt the context tower reads first (B,): all but the last token."""
        return request.count - 1

    def write(
        self, config: Config, params: dict, state: TowerState, p: Progress, request: Request
    ) -> tuple[Progress, jax.Array]:
        """The next token of every row; what the context tower reads next is the one before it (B, 1)."""
        end = jnp.take_along_axis(request.prompts, request.count[:, None] - 1, axis=1)
        last = jnp.where(p.unit == 0, end, newest(p))
        logits = two_tower.denoise(config, params, state, last, t=None)[:, 0]
        return append(config, self.sampler, p, request, logits), last

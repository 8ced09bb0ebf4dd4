"""What a caller asks of the engine, and what it hears back."""

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np

from twotower_jax import inputs
from twotower_jax.decoding import BLOCK_MODES, MODES
from twotower_jax.decoding.block import Block
from twotower_jax.decoding.unmasking import DEFAULT, Choice, chosen
from twotower_jax.errors import InputError

STOP_IDS = 16  # ids that may end a row
SHARED = 64  # tokens that prompts must begin with in common to be read once


@dataclasses.dataclass(frozen=True)
class Request:
    """One row. What it gives depends on nothing but these fields and the model.

    Attributes:
      key: tells the caller's requests apart; events carry it.
      prompt: token ids.
      mode: `diffusion`, `ar`, `mock-ar`, or `verified`: what `ar` writes, in blocks that the denoiser drafts.
      max_new_tokens: need not be a multiple of the block size.
      block_size: diffusion, verified: positions denoised together, at most the engine's.
      steps_per_block: diffusion: most denoiser passes a block.
      unmasking: diffusion, verified: which predictions a pass commits, `NAME` or `NAME=NUMBER`; see
        `decoding.unmasking`.
      confidence_threshold: short for `threshold=`: predictions above this probability are committed, in [0, 1].
      draft_passes: verified: denoiser passes a block, at most; None: as many as pay.
      accept_probability: verified: drafts that AR gives at least this probability are accepted, too; with None the
        text is AR's own.
      temperature: 0 is greedy.
      top_k, top_p: draw from the k most probable tokens, from the nucleus of mass p; None restricts nothing.
      eos_token_id: id or ids that end the row, at most 16.
      seed, row: what the draws depend on, with the position.
    """

    key: Hashable
    prompt: Sequence[int]
    mode: str = "diffusion"
    max_new_tokens: int = 128
    block_size: int = 16
    steps_per_block: int = 16
    unmasking: str | None = None
    confidence_threshold: float | None = None
    draft_passes: int | None = None
    accept_probability: float | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    eos_token_id: int | Sequence[int] | None = None
    seed: int = 0
    row: int = 0

    def checked(self, vocab_size: int, two_towers: bool) -> "Request":
        """The request with its prompt as an array (L,) int32, its stop ids as one, and its rule as a
        `decoding.unmasking.Choice`.

        Raises:
          InputError: what is wrong, in one line.
        """
        if self.mode not in MODES:
            raise InputError(f"mode {self.mode!r} does not exist; choose {', '.join(MODES)}")
        if self.mode != "ar" and not two_towers:
            raise InputError(f"mode {self.mode} needs a denoiser, and this model is a backbone: it has ar alone")
        eos = inputs.stop_ids(self.eos_token_id, vocab_size)
        if len(eos) > STOP_IDS:
            raise InputError(f"eos_token_id has {len(eos)} ids; at most {STOP_IDS} can end a row")
        inputs.whole("steps_per_block", self.steps_per_block, 1, 2**31 - 1)
        if self.draft_passes is not None:
            inputs.whole("draft_passes", self.draft_passes, 1, 2**31 - 1)
        if self.accept_probability is not None:
            inputs.number("accept_probability", self.accept_probability, 0, 1, open_low=True)
        temperature, top_k, top_p = inputs.sampling(self.temperature, self.top_k, self.top_p)
        return dataclasses.replace(
            self,
            prompt=inputs.token_ids("prompt", self.prompt, vocab_size),
            max_new_tokens=inputs.whole("max_new_tokens", self.max_new_tokens, 0, 2**30),
            block_size=inputs.whole("block_size", self.block_size, 1, 2**16),
            unmasking=self._rule(),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=eos,
            seed=inputs.whole("seed", self.seed, 0, 2**32 - 1),
            row=inputs.whole("row", self.row, 0, 2**31 - 1),
        )

    def _rule(self) -> Choice:
        if self.confidence_threshold is None:
            return chosen(DEFAULT if self.unmasking is None else self.unmasking)
        if self.unmasking is not None:
            raise InputError("confidence_threshold is the rule threshold's; give it or unmasking, not both")
        bound = inputs.number("confidence_threshold", self.confidence_threshold, 0, 1)
        return Choice("threshold", bound, 0.0)

    @property
    def read_first(self) -> int:
        """Tokens of the prompt that the context tower reads before anything is written: one token a step begins with
        the last one.
        """
        return len(self.prompt) - (self.mode != "diffusion")

    @property
    def block(self) -> int:
        """Positions that are written together."""
        return self.block_size if self.mode in BLOCK_MODES else 1

    @property
    def positions(self) -> int:
        """Of the context's state, that the row needs at most: the block that ends a row is never read, but in
        verified decoding, where it may reach beyond the row's end.
        """
        unit = self.block
        if self.mode == "verified":
            return self.read_first + max(0, self.max_new_tokens - 1) + unit
        return self.read_first + max(0, -(-self.max_new_tokens // unit) - (self.mode == "diffusion")) * unit


@dataclasses.dataclass(frozen=True)
class Event:
    """What a row wrote: a block, or some tokens; the last one ends it.

    Attributes:
      key: the request's.
      tokens: new ones, up to and including one that ends the row.
      logprobs: of each token, the logarithm of the probability that it had when it was committed, before temperature.
      end: None; or `stop`, `length`, `cancelled` or `error`.
      error: None, or why the row ended early.
      denoiser_forwards: passes of the denoiser that the row has needed so far.
      context_forwards: passes of the context tower, the prompt's counted as one.
      block: the block that the tokens come from, as it was denoised, if the engine watches; its arrays are of one row.
    """

    key: Hashable
    tokens: list[int]
    logprobs: list[float]
    end: str | None
    error: str | None
    denoiser_forwards: int
    context_forwards: int
    block: Block | None = None


def counted(mode: str, denoiser: int, context: int) -> int:
    """The passes that a mode's tokens per forward are counted by: the denoiser's; AR's of the context tower; in
    verified decoding all, as both towers write.
    """
    return {"ar": context, "verified": denoiser + context}.get(mode, denoiser)


def common(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """What two sequences of tokens begin with in common."""
    n = min(len(one), len(other))
    (differ,) = np.nonzero(one[:n] != other[:n])
    return one[: differ[0] if len(differ) else n]


def worth_sharing(prefix: np.ndarray, requests: int) -> np.ndarray:
    """A prefix that so many requests begin with, if it is worth being read by itself; otherwise none."""
    return prefix if requests > 1 and len(prefix) >= SHARED else prefix[:0]


def cut(tokens: np.ndarray, eos: np.ndarray) -> int:
    """How many of the tokens come up to and including the first that ends a row."""
    ends = np.flatnonzero(np.isin(tokens, eos))
    return int(ends[0]) + 1 if len(ends) else len(tokens)

"""What an engine that watches tells of its rows, as a trace."""

from collections.abc import Callable, Sequence

import numpy as np

from twotower_jax.decoding import block as decoding
from twotower_jax.engine.request import Event
from twotower_jax.trace.record import Block, Pass, Row, Trace


class Recorder:
    """Hears the events of rows; `Model.generate(..., watch=recorder)`.

    Args:
      mode: the rows'.
      prompts: of the rows, whose keys are their places.
    """

    def __init__(self, mode: str, prompts: Sequence[Sequence[int]]):
        self._mode, self._prompts = mode, prompts
        self._events: list[list[Event]] = [[] for _ in prompts]

    def __call__(self, event: Event) -> None:
        self._events[event.key].append(event)

    def trace(self, model: str, settings: dict[str, str | float], text: Callable[[int], str]) -> Trace:
        """All rows, which must have ended.

        Args:
          model: its name.
          settings: what was asked for.
          text: of a token.
        """
        rows = [self._row(prompt, events) for prompt, events in zip(self._prompts, self._events, strict=True)]
        return Trace(rows, model, settings, {token: text(token) for row in rows for token in _occurring(row)})

    def _row(self, prompt: Sequence[int], events: list[Event]) -> Row:
        tokens, probabilities, blocks = [], [], []
        for event in events:
            if event.block is not None:
                blocks.append(_block(event, len(tokens), self._mode == "verified"))
            tokens += event.tokens
            probabilities += np.exp(event.logprobs).tolist()
        last = events[-1]
        forwards = last.denoiser_forwards, last.context_forwards
        return Row([int(i) for i in prompt], self._mode, tokens, probabilities, blocks, last.end, forwards)


def _block(event: Event, start: int, verified: bool) -> Block:
    block, size = event.block, int(event.block.size)
    tokens = block.tokens[:size].tolist()
    passes = [_pass(block, step, size) for step in range(int(block.step))]
    if not verified:
        return Block(start, passes, tokens, 0, len(event.tokens), None)
    pairs = zip([*tokens[1:], None], event.tokens, strict=False)
    kept = next((i for i, (drafted, written) in enumerate(pairs) if drafted != written), len(event.tokens))
    return Block(start, passes, tokens, 1, kept, event.tokens[kept] if kept < len(event.tokens) else None)


def _pass(block: decoding.Block, step: int, size: int) -> Pass:
    """At a position that this pass commits for good, what it drew; elsewhere what was the most probable."""
    masked = block.history.masked[: int(block.step), :size]
    final = masked[step] & ~masked[step + 1 :].any(0) & ~block.masked[:size]
    predicted = np.where(final, block.tokens[:size], block.history.top[step, :size])
    confidence = np.where(final, block.confidence[:size], block.history.probability[step, :size])
    return Pass(predicted.tolist(), confidence.tolist(), masked[step].tolist())


def _occurring(row: Row) -> set[int]:
    found = {*row.prompt, *row.tokens}
    for block in row.blocks:
        found.update(block.tokens, *(step.predicted for step in block.passes))
    return found

"""What rows have written so far, and the strings that end them."""

import dataclasses
from collections.abc import Hashable, Iterable, Iterator, Sequence

from tokenizers import Tokenizer

from twotower_jax.engine.request import Event, Request
from twotower_jax.engine.scheduler import Engine


@dataclasses.dataclass
class Answer:
    """What a row has written so far.

    Attributes:
      request: what is asked, checked.
      stop: strings that end the text, and are not part of it.
      tokens: new ones, up to and including one that ends the row or the fewest that hold a stop string.
      logprobs: theirs.
      end, error: see `Event`.
      forwards: passes of denoiser and context tower.
    """

    request: Request
    stop: Sequence[str] = ()
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    end: str | None = None
    error: str | None = None
    forwards: tuple[int, int] = (0, 0)

    def text(self, tokenizer: Tokenizer) -> str:
        """The text, without a token that ends the row, up to the first stop string."""
        text = self._whole_text(tokenizer, len(self.tokens))
        return text[: min([at for s in self.stop if (at := text.find(s)) >= 0], default=len(text))]

    def hear(self, event: Event, tokenizer: Tokenizer | None) -> None:
        """Adds what the row wrote; without a tokenizer there is no stop string."""
        before = len(self.tokens)
        self.tokens += event.tokens
        self.logprobs += event.logprobs
        self.forwards = (event.denoiser_forwards, event.context_forwards)
        self.end, self.error = event.end, event.error
        if self._stops(tokenizer, len(self.tokens)):
            n = next(n for n in range(before + 1, len(self.tokens) + 1) if self._stops(tokenizer, n))
            del self.tokens[n:], self.logprobs[n:]
            if self.request.mode in ("ar", "mock-ar"):  # of as many as it was, however many came together
                self.forwards = (n, 1 + n) if self.request.mode == "mock-ar" else (0, n)
            self.end = "stop"

    def _whole_text(self, tokenizer: Tokenizer, n: int) -> str:
        """Of the first n tokens."""
        tokens = self.tokens[:n]
        return tokenizer.decode(tokens[:-1] if tokens and tokens[-1] in self.request.eos_token_id else tokens)

    def _stops(self, tokenizer: Tokenizer | None, n: int) -> bool:
        """Whether the first n tokens hold a stop string."""
        return bool(self.stop) and any(s in self._whole_text(tokenizer, n) for s in self.stop)


def grow(engine: Engine, tokenizer: Tokenizer | None, asked: Iterable[Answer]) -> Iterator[Answer]:
    """Has an engine write answers, which are taken as there is room for them.

    Returns:
      an answer each time that it has grown; the last time it has its end.
    """
    at_work: dict[Hashable, Answer] = {}

    def requests() -> Iterator[Request]:
        for answer in asked:
            at_work[answer.request.key] = answer
            yield answer.request

    for event in engine.run(requests()):
        answer = at_work[event.key]
        answer.hear(event, tokenizer)
        if answer.end is not None:
            if event.end is None:
                engine.cancel(event.key)
            del at_work[event.key]
        yield answer

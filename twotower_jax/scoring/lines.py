"""Lines of JSON that hold texts, and lines that say how probable these are."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer

from twotower_jax import inputs
from twotower_jax.engine.lines import parsed
from twotower_jax.errors import InputError, short
from twotower_jax.scoring.score import Scores

AT_ONCE = 4096  # lines that are scored together


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the input.

    Attributes:
      number: from 1.
      id: its own, None if it has none.
      pair: ids that are given, and those that are scored; None if something is wrong.
      bytes: of the text that is scored; None where ids are.
      error: what is wrong.
    """

    number: int
    id: Any = None
    pair: tuple[Any, Any] | None = None
    bytes: int | None = None
    error: str | None = None


@dataclasses.dataclass
class Summary:
    """Of all lines.

    Attributes:
      lines: how many there are.
      errors: how many of them have no score.
      tokens: that were scored.
      tokens_read: by the context tower.
      perplexity: of a token; by the denoiser at most; None without tokens.
      bits_per_byte: of scored text; None where there is none.
      seconds: without compilation.
      compile_seconds: of the programs.
    """

    lines: int = 0
    errors: int = 0
    tokens: int = 0
    tokens_read: int = 0
    perplexity: float | None = None
    bits_per_byte: float | None = None
    seconds: float = 0.0
    compile_seconds: float = 0.0

    def __str__(self) -> str:
        of = [f"{self.lines} lines", f"{self.errors} errors", f"{self.tokens} tokens"]
        if self.perplexity is not None:
            of.append(f"perplexity {self.perplexity:.4g} a token")
        if self.bits_per_byte is not None:
            of.append(f"{self.bits_per_byte:.4g} bits a byte")
        return f"{', '.join(of)}\n{self.seconds:.2f} s, and {self.compile_seconds:.1f} s to compile"


class Reader:
    """Makes pairs of lines.

    A text's first token is given, all others are scored. A prompt is encoded as `generate` does it, a completion by
    itself, without special tokens, as in training.

    Args:
      tokenizer: of text; None if the model has none.
      vocab_size: of the model.
      longest: tokens of a line at most.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, longest: int):
        self._tokenizer, self._vocab_size, self._longest = tokenizer, vocab_size, longest

    def line(self, number: int, raw: bytes) -> Line:
        """A line's pair, or what is wrong with it."""
        line = Line(number)
        try:
            found = parsed(raw)
            line = dataclasses.replace(line, id=found.get("id"))
            pair, size = self._pair(found)
            if (tokens := sum(map(len, pair))) > self._longest:
                raise InputError(f"its {tokens} tokens are too many: {self._longest} fit")
            return dataclasses.replace(line, pair=pair, bytes=size)
        except InputError as error:
            return dataclasses.replace(line, error=str(error))

    def _pair(self, found: dict[str, Any]) -> tuple[tuple[Any, Any], int | None]:
        if set(found) & {"text", "prompt", "completion"} not in ({"text"}, {"prompt", "completion"}):
            raise InputError('it must have "text", or "prompt" and "completion"')
        if "text" not in found:
            prompt, _ = self._ids("prompt", found["prompt"], special=True)
            completion, _ = self._ids("completion", found["completion"], special=False)
            return (prompt, completion), _bytes(found["completion"], 0)
        ids, end = self._ids("text", found["text"], special=True)
        if len(ids) < 2:
            raise InputError("text has one token, which is given; what is scored comes after it")
        return (ids[:1], ids[1:]), _bytes(found["text"], end)

    def _ids(self, name: str, value: Any, special: bool) -> tuple[Any, int]:
        """Token ids of a text, or of a list of them; and the character where the first token ends."""
        end = 0
        if isinstance(value, str):
            if self._tokenizer is None:
                raise InputError(f"the model has no tokenizer.json, so {name} must be a list of token ids")
            try:
                value.encode()
            except UnicodeEncodeError:
                raise InputError(f"{name} has half of a surrogate pair, which is no text") from None
            encoded = self._tokenizer.encode(value, add_special_tokens=special)
            value, end = encoded.ids, encoded.offsets[0][1] if encoded.ids else 0
        elif not isinstance(value, list):
            raise InputError(f"{name} must be text or a list of token ids, not {short(value)}")
        return inputs.token_ids(name, value, self._vocab_size), end


def _bytes(value: Any, start: int) -> int | None:
    """Of a text from a character on."""
    return len(value[start:].encode()) if isinstance(value, str) else None


def answers(
    lines: Iterable[Line], score: Callable[[list[tuple[Any, Any]]], Scores], summary: Summary
) -> Iterator[dict[str, Any]]:
    """What is said of each line, in order; the summary is filled in on the way."""
    lines, total, bits, size = iter(lines), 0.0, 0.0, 0
    while some := list(itertools.islice(lines, AT_ONCE)):
        good = [line for line in some if line.pair is not None]
        scores = score([line.pair for line in good])
        place = {line.number: i for i, line in enumerate(good)}
        for line in some:
            i = place.get(line.number)
            error = line.error if i is None else scores.errors[i]
            about = {"line": line.number} | ({} if line.id is None else {"id": line.id})
            summary.lines += 1
            if error is not None:
                summary.errors += 1
                yield about | {"error": error}
                continue
            logprob, tokens = scores.logprobs[i], len(line.pair[1])
            summary.tokens, total = summary.tokens + tokens, total + logprob
            if line.bytes:
                bits, size = bits - logprob / math.log(2), size + line.bytes
            about |= {"logprob": logprob, "tokens": tokens}
            for name, values in (
                ("greedy", scores.greedy),
                ("standard_error", scores.standard_errors),
                ("per_token", scores.per_token),
            ):
                about |= {} if values is None else {name: values[i]}
            yield about
        summary.tokens_read += scores.tokens_read
        summary.seconds += scores.seconds
        summary.compile_seconds += scores.compile_seconds
    if summary.tokens:
        summary.perplexity = math.exp(min(-total / summary.tokens, 700.0))
    if size:
        summary.bits_per_byte = bits / size

"""Lines of JSON that ask for text, and lines that answer them: OpenAI's batch format, as `vllm run-batch` reads it, or
plain `{"prompt": ...}` and `{"text": ...}`.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tokenizers import Tokenizer

from twotower_jax import inputs
from twotower_jax.engine.answers import Answer
from twotower_jax.engine.request import Request, counted
from twotower_jax.errors import InputError, short

LONGEST = 2**23  # bytes of a line
URL = "/v1/completions"
OUTER = ("custom_id", "method", "url", "body")

# What a body may hold, by the request's own name.
NUMBERS = {
    "max_tokens": "max_new_tokens",
    "mode": "mode",
    "block_size": "block_size",
    "steps_per_block": "steps_per_block",
    "confidence_threshold": "confidence_threshold",
    "unmasking": "unmasking",
    "draft_passes": "draft_passes",
    "accept_probability": "accept_probability",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "seed": "seed",
}
OTHERS = ("prompt", "stop", "stop_token_ids", "ignore_eos", "logprobs", "model", "user")
ONLY = {  # understood, but with one value alone
    "n": 1,
    "best_of": 1,
    "stream": False,
    "echo": False,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "suffix": None,
    "logit_bias": None,
    "stream_options": None,
}
STOPS = 16  # strings that may end a row


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a line asks for.

    Attributes:
      request: its key is the line's number.
      stop: strings that end the text, and are not part of it.
      logprobs: whether the tokens' are wanted.
      model: as the line names it.
    """

    request: Request
    stop: tuple[str, ...]
    logprobs: bool
    model: str | None


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the input.

    Attributes:
      number: from 1.
      id: of the result: the number, and the checksum of the line that it answers.
      custom_id: the line's own, `line-N` for plain lines that have none; None if it cannot be read.
      ask: what it asks for; None if something is wrong.
      error: what that is.
    """

    number: int
    id: str
    custom_id: str | None
    ask: Ask | None
    error: str | None


def raw_lines(file: BinaryIO) -> Iterator[tuple[int, bytes, int]]:
    """Each line's number, its bytes without the line's end, at most `LONGEST` of them, and its checksum."""
    number = 0
    while first := file.readline(LONGEST + 1):
        number += 1
        last, line = first, first.removesuffix(b"\n").removesuffix(b"\r")
        checksum = zlib.crc32(line)  # with any end of line, or none
        while not last.endswith(b"\n") and (last := file.readline(LONGEST)):
            checksum = zlib.crc32(last, checksum)
        yield number, line, checksum


class Reader:
    """Makes requests of lines.

    Args:
      tokenizer: of text; None if the model has none.
      vocab_size: of the model.
      two_towers: whether it has a denoiser.
      eos: ids that end a row unless its line says `ignore_eos`.
      defaults: fields of `Request` for lines that do not say.
      possible: how many positions a request can have whose block is of a size; 0 if there can be none.
      model: what tells it from other models.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        two_towers: bool,
        eos: Sequence[int],
        defaults: dict[str, Any],
        possible: Callable[[int], int],
        model: str,
    ):
        self._tokenizer, self._vocab_size, self._two_towers = tokenizer, vocab_size, two_towers
        self._eos, self._defaults, self._possible = list(eos), defaults, possible
        unsaid = {"mode": Request.mode, "max_new_tokens": Request.max_new_tokens} | defaults
        self._salt = zlib.crc32(json.dumps([model, self._eos, sorted(unsaid.items())]).encode())

    def checksum(self, of_line: int) -> int:
        """Of all that an answer depends on: the line, of which the checksum is given, the model and the defaults."""
        return zlib.crc32(of_line.to_bytes(4), self._salt)

    def line(self, number: int, raw: bytes, checksum: int) -> Line:
        """What a line asks for, or what is wrong with it."""
        custom_id, name = None, f"line-{number}-{self.checksum(checksum):08x}"
        try:
            outer = parsed(raw)
            custom_id = _custom_id(outer, number)
            return Line(number, name, custom_id, self._ask(number, custom_id, _body(outer)), None)
        except InputError as error:
            return Line(number, name, _id_of(raw) if custom_id is None else custom_id, None, _as_written(str(error)))

    def _ask(self, number: int, custom_id: str, body: dict[str, Any]) -> Ask:
        known = {*NUMBERS, *OTHERS, *ONLY}
        for key, value in body.items():
            if key not in known:
                raise InputError(f"unknown key {short(key)}; known are {', '.join(sorted(known))}")
            if key in ONLY and value is not None and json.dumps(value) != json.dumps(ONLY[key]):
                raise InputError(f"{key} {short(value)} is not supported; only {json.dumps(ONLY[key])} is")
        given = {key: value for key, value in body.items() if value is not None}  # null is what is not said
        for key in ("model", "user"):
            if not isinstance(given.get(key, ""), str):
                raise InputError(f"{key} must be a string, not {short(given[key])}")
        eos = [] if _flag(given, "ignore_eos") else self._eos
        request = Request(
            key=number,
            prompt=self._prompt(given),
            eos_token_id=[*eos, *_stop_ids(given)],
            **{
                **self._defaults,
                "seed": zlib.crc32(custom_id.encode()),
                **{NUMBERS[key]: value for key, value in given.items() if key in NUMBERS},
            },
        ).checked(self._vocab_size, self._two_towers)
        possible = self._possible(request.block)
        if possible == 0:
            raise InputError(f"block_size {request.block_size} is too large: not one such row fits")
        if request.positions > possible:
            raise InputError(
                f"the prompt's {len(request.prompt)} tokens and {request.max_new_tokens} new ones are too long: "
                f"they need {request.positions} positions of {possible}"
            )
        if "logprobs" in given and inputs.whole("logprobs", given["logprobs"], 0) > 0:
            raise InputError(f"logprobs {given['logprobs']} is not supported; 0 gives those of the tokens written")
        return Ask(request, self._stops(given), "logprobs" in given, given.get("model"))

    def _prompt(self, given: dict[str, Any]) -> Any:
        prompt = given.get("prompt")
        if prompt is None:
            raise InputError("there is no prompt")
        if not isinstance(prompt, str):
            if not isinstance(prompt, list):
                raise InputError(f"prompt must be text or a list of token ids, not {short(prompt)}")
            if any(isinstance(item, str | list) for item in prompt):
                raise InputError("prompt must be one prompt, text or a list of token ids; give each a line of its own")
            return prompt
        if self._tokenizer is None:
            raise InputError("the model has no tokenizer.json, so a prompt must be a list of token ids")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise InputError("prompt has half of a surrogate pair, which is no text") from None
        return self._tokenizer.encode(prompt).ids

    def _stops(self, given: dict[str, Any]) -> tuple[str, ...]:
        stop = given.get("stop", [])
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops) or len(stops) > STOPS:
            raise InputError(f"stop must be a string or a list of up to {STOPS}, none of them empty, not {short(stop)}")
        if stops and self._tokenizer is None:
            raise InputError("the model has no tokenizer.json, so stop cannot be found; give stop_token_ids")
        return tuple(stops)


def _as_written(message: str) -> str:
    """With the names that a line has for the fields of `Request`."""
    message = message.replace("max_new_tokens", "max_tokens")
    return message.replace("eos_token_id", "stop_token_ids, with the model's own,")


def _id_of(raw: bytes) -> str | None:
    """The custom_id of a line that is wrong otherwise, if it can be read."""
    try:
        found = json.loads(raw[: LONGEST + 1])
        custom_id = found["custom_id"]
        custom_id.encode()
        return custom_id or None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise InputError(f"the key {short(twice)} stands twice")
    return found


def _no_number(text: str) -> None:
    raise InputError(f"{text} is no number of JSON")


def parsed(raw: bytes) -> dict[str, Any]:
    """A line as an object."""
    if len(raw) > LONGEST:
        raise InputError(f"it has more than {LONGEST} bytes")
    if not raw.strip():
        raise InputError("it is empty")
    try:
        found = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise InputError(f"it is not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"it is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise InputError("it is nested too deeply") from None
    except InputError:  # which is a ValueError
        raise
    except ValueError:  # an integer of more digits than Python reads
        raise InputError("it has a number of thousands of digits") from None
    if not isinstance(found, dict):
        raise InputError(f"it must be an object, not {short(found)}")
    return found


def _plain(outer: dict[str, Any]) -> bool:
    """Whether a line is the body itself."""
    return "body" not in outer and "url" not in outer and ("prompt" in outer or "text" in outer)


def _custom_id(outer: dict[str, Any], number: int) -> str:
    custom_id = outer.get("custom_id")
    if custom_id is None and _plain(outer):
        return f"line-{number}"
    if not isinstance(custom_id, str) or not custom_id:
        raise InputError(f"custom_id must be a string that is not empty, not {short(custom_id)}")
    try:
        custom_id.encode()
    except UnicodeEncodeError:
        raise InputError("custom_id has half of a surrogate pair, which is no text") from None
    return custom_id


def _body(outer: dict[str, Any]) -> dict[str, Any]:
    if _plain(outer):
        body = {key: value for key, value in outer.items() if key != "custom_id"}
        if "text" not in body:
            return body
        if "prompt" in body:
            raise InputError("it has both prompt and text; give one")
        if not isinstance(body["text"], str):
            raise InputError(f"text must be a string, not {short(body['text'])}")
        return {"prompt": body.pop("text"), **body}
    for key in outer:
        if key not in OUTER:
            raise InputError(f"unknown key {short(key)} beside the body; known are {', '.join(OUTER)}")
    if outer.get("method", "POST") != "POST":
        raise InputError(f"method must be POST, not {short(outer['method'])}")
    if outer.get("url") != URL:
        raise InputError(f"url must be {URL}, not {short(outer.get('url'))}")
    if not isinstance(outer.get("body"), dict):
        raise InputError(f"body must be an object, not {short(outer.get('body'))}")
    return outer["body"]


def _flag(given: dict[str, Any], key: str) -> bool:
    if not isinstance(value := given.get(key, False), bool):
        raise InputError(f"{key} must be true or false, not {short(value)}")
    return value


def _stop_ids(given: dict[str, Any]) -> list[Any]:
    if not isinstance(ids := given.get("stop_token_ids", []), list):
        raise InputError(f"stop_token_ids must be a list of token ids, not {short(ids)}")
    return ids


def result(line: Line, answer: Answer, tokenizer: Tokenizer | None, model: str) -> bytes:
    """The line that answers one, with its end. It depends on the answer alone: it has no times."""
    if answer.error is not None:
        return _refused(line, "failed", answer.error)
    ask, text = line.ask, None if tokenizer is None else answer.text(tokenizer)
    choice = {"index": 0, "text": text, "token_ids": answer.tokens, "finish_reason": answer.end, "logprobs": None}
    if ask.logprobs:
        choice["logprobs"] = _logprobs(answer, tokenizer)
    prompt, written = len(ask.request.prompt), len(answer.tokens)
    usage = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
    usage |= {"denoiser_forwards": answer.forwards[0], "context_forwards": answer.forwards[1]}
    usage |= {"forwards": counted(ask.request.mode, *answer.forwards)}
    body = {"id": line.id, "object": "text_completion", "created": 0, "model": ask.model or model}
    body |= {"choices": [choice], "usage": usage}
    response = {"status_code": 200, "request_id": line.id, "body": body}
    return _dumped({"id": line.id, "custom_id": line.custom_id, "response": response, "error": None})


def refusal(line: Line) -> bytes:
    """The line that answers one which is wrong."""
    return _refused(line, "invalid_request", line.error)


def _refused(line: Line, code: str, why: str) -> bytes:
    error = {"code": code, "line": line.number, "message": f"line {line.number}: {why}"}
    return _dumped({"id": line.id, "custom_id": line.custom_id, "response": None, "error": error})


def _logprobs(answer: Answer, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """OpenAI's form; what has no probability is given its least number, -9999."""
    texts = None if tokenizer is None else [tokenizer.decode([t], skip_special_tokens=False) for t in answer.tokens]
    values = [max(x, -9999.0) if not math.isnan(x) else -9999.0 for x in answer.logprobs]
    return {"tokens": texts, "token_logprobs": values, "top_logprobs": None, "text_offset": None}


def _dumped(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def done_lines(file: Path) -> dict[int, str]:
    """The lines that a file of results answers: number to checksum. A half-written last line is cut off.

    Raises:
      InputError: the file holds something else.
    """
    done: dict[int, str] = {}
    with open(file, "rb+") as handle:
        end = 0
        for at, raw in enumerate(handle, 1):
            if not raw.endswith(b"\n"):
                break
            try:
                _, number, checksum = json.loads(raw)["id"].split("-")
                done[int(number)] = checksum
            except (ValueError, TypeError, KeyError, AttributeError):
                raise InputError(f"{file}: line {at} is no result of this command; give another file") from None
            end += len(raw)
        handle.truncate(end)
    return done

"""lm-evaluation-harness's view of a model: log-likelihoods of a tower, and text by the batch engine in any mode."""

import dataclasses
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from tokenizers import Tokenizer
from tqdm import tqdm

import twotower_jax as tt
from twotower_jax import distributed, inputs, sources
from twotower_jax.engine.answers import Answer, grow
from twotower_jax.engine.job import POSITIONS
from twotower_jax.engine.request import Request, counted
from twotower_jax.errors import InputError, short
from twotower_jax.placement import Placement, parse_devices, parse_mesh, shared
from twotower_jax.tokenizer import load_tokenizer

LIKELIHOODS = ("context", "denoiser")
UNSAID = 256  # new tokens where a task names no number, as for lm-eval's own models
GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k")  # what a task may say
DECODING = (  # fields of `Request`
    "block_size",
    "steps_per_block",
    "confidence_threshold",
    "unmasking",
    "draft_passes",
    "accept_probability",
)


@dataclasses.dataclass
class Tally:
    """What rows that were written came to.

    Attributes:
      tokens: new ones, to the end of each answer.
      denoiser_forwards, context_forwards: passes that the rows needed, added over rows.
      errors: why rows, or continuations, ended early, each reason once.
    """

    tokens: int = 0
    denoiser_forwards: int = 0
    context_forwards: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)

    def tokens_per_forward(self, mode: str) -> float | None:
        """By the passes that `counted` says. None if nothing was written."""
        forwards = counted(mode, self.denoiser_forwards, self.context_forwards)
        return self.tokens / forwards if forwards else None

    def add_errors(self, errors: Sequence[str | None]) -> None:
        self.errors += [error for error in dict.fromkeys(errors) if error is not None and error not in self.errors]


@register_model("twotower")
class TwoTowerLM(TemplateLM):
    """A model in one mode, for `lm_eval.simple_evaluate`.

    Args:
      model: what `tt.load` gives.
      tokenizer: its own.
      mode: what writes.
      likelihood: whose log-likelihoods: the context tower's, or the denoiser's bound, which calls no text greedy.
      samples: masks of each block that the bound is a mean over.
      max_length: positions; longer prompts lose their beginning.
      max_gen_toks: new tokens where a task names no number.
      prefix_token_id: what stands before a text without context; the first id that ends a row by default.
      slots: rows that are written at a time; by default as many as fit and pay.
      seed: of the random draws, with the prompt and how often it came before.
      name: of the model.
      **decoding: block_size, steps_per_block, confidence_threshold, unmasking, draft_passes, accept_probability; see
        `tt.Request`.

    Attributes:
      tally: of what was written so far.
    """

    def __init__(
        self,
        model: tt.Model,
        tokenizer: Tokenizer,
        *,
        mode: str = "diffusion",
        likelihood: str = "context",
        samples: int = 16,
        max_length: int = POSITIONS,
        max_gen_toks: int = UNSAID,
        prefix_token_id: int | None = None,
        slots: int | None = None,
        seed: int = 0,
        name: str = "model",
        **decoding: Any,
    ):
        super().__init__()
        for key in decoding:
            if key not in DECODING:
                raise InputError(f"{key} is no argument of the model twotower; known are {', '.join(_known())}")
        if likelihood not in LIKELIHOODS:
            raise InputError(f"likelihood {short(likelihood)} does not exist; choose {' or '.join(LIKELIHOODS)}")
        vocab = model.config.vocab_size
        if not model.config.eos_token_ids and prefix_token_id is None:
            raise InputError("config.json has no eos_token_id to stand before texts; give prefix_token_id")
        self.model, self.mode, self.likelihood, self.tally = model, mode, likelihood, Tally()
        self.max_length = inputs.whole("max_length", max_length, 2, 2**31 - 1)
        self.max_gen_toks = inputs.whole("max_gen_toks", max_gen_toks, 1, 2**30)
        self._samples = inputs.whole("samples", samples, 2, 2**16)
        self._slots = None if slots is None else inputs.whole("slots", slots, 1, 2**20)
        self._seed = inputs.whole("seed", seed, 0, 2**32 - 1)
        self._eos = list(model.config.eos_token_ids)
        prefix = self._eos[0] if prefix_token_id is None else prefix_token_id
        self._prefix = inputs.whole("prefix_token_id", prefix, 0, vocab - 1)
        self._text, self._name = tokenizer, name
        self._decoding = {key: value for key, value in decoding.items() if value is not None}
        Request(0, [0], mode=mode, **self._decoding).checked(vocab, model.two_towers)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> "TwoTowerLM":
        """As `lm_eval --model_args` gives them."""
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> "TwoTowerLM":
        """Loads the model that the arguments name.

        Args:
          arg_dict: `pretrained`, a folder, the name of a shipped model or a Hugging Face id; `dtype`, bfloat16 by
            default; `context_devices`, `denoiser_devices` and `mesh` as the command takes them; and the constructor's.
          additional_config: `batch_size`, `max_batch_size` and `device`, which the harness gives unasked; `slots` and
            the devices above are in their place.
        """
        args = dict(arg_dict)
        if not (pretrained := args.pop("pretrained", None)):
            raise InputError("the model twotower needs pretrained=MODEL")
        placement = Placement(
            *(
                None if (text := args.pop(name, None)) is None else parse_devices(name, str(text))
                for name in ("context_devices", "denoiser_devices")
            ),
            None if (mesh := args.pop("mesh", None)) is None else parse_mesh(str(mesh)),
        )
        model, tokenizer, prefix = load(pretrained, args.pop("dtype", "bfloat16"), placement)
        return cls(model, tokenizer, name=str(pretrained), **{"prefix_token_id": prefix, **args})

    @property
    def eot_token_id(self) -> int:
        return self._eos[0] if self._eos else self._prefix

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """What tells request caches of tokenizers apart."""
        return self._name.replace("/", "__")

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        raise InputError("the model twotower is a base model and has no chat template; leave --apply_chat_template out")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.apply_chat_template() if chat_template else ""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special ones are added as tokenizer.json says, unless the text begins with the prefix."""
        if add_special_tokens is None:
            prefix = self._text.decode([self._prefix], skip_special_tokens=False)
            add_special_tokens = not (prefix and string.startswith(prefix))
        return self._text.encode(string, add_special_tokens=add_special_tokens).ids

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of `max_length` positions; see `LM.loglikelihood_rolling`."""
        windows = [
            [
                utils.make_disjoint_window(window)
                for window in utils.get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
                )
            ]
            for (text,) in (request.args for request in requests)
        ]
        scored = iter(self._loglikelihood_tokens([(None, *pair) for pairs in windows for pair in pairs]))
        sums = [sum(next(scored)[0] for _ in pairs) for pairs in windows]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str] | None, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """All pairs at once: what they share is read once."""
        pairs = []
        for text, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                what = f"the continuation {short(text[1])}" if text else "a window"
                raise InputError(f"{what} has {len(continuation)} tokens; it takes from 1 to {self.max_length}")
            kept = self.max_length + 1 - len(continuation)  # the last token of all is not read
            pairs.append((context[-kept:], continuation))
        if not pairs:
            return []
        options = {"samples": self._samples, "seed": self._seed}
        if (block_size := self._decoding.get("block_size")) is not None:
            options["block_size"] = block_size
        scores = self.model.score(pairs, by=self.likelihood, **options)
        self.tally.add_errors(scores.errors)
        greedy = scores.greedy or [False] * len(pairs)
        logprobs = [-math.inf if x is None else x for x in scores.logprobs]
        found = [(x, bool(same)) for x, same in zip(logprobs, greedy, strict=True)]
        for (text, _, _), one in zip(requests, found, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, one)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """All requests at once, each at its own pace."""
        asked, came = [], {}
        for key, (context, options) in enumerate(request.args for request in requests):
            came[context] = row = came.get(context, -1) + 1
            asked.append(self._answer(key, context, options, row))
        if not asked:
            return []
        engine = self.model.engine_for([answer.request for answer in asked], slots=self._slots)
        hidden = True if disable_tqdm or not distributed.first() else None
        with tqdm(total=len(asked), desc=f"{self.mode}: generate_until", disable=hidden) as bar:
            for answer in grow(engine, self._text, asked):
                if answer.end is not None:
                    self._count(answer)
                    text = answer.text(self._text)
                    self.cache_hook.add_partial("generate_until", requests[answer.request.key].args, text)
                    bar.update()
        return [answer.text(self._text) for answer in asked]

    def _answer(self, key: int, context: str, options: dict, row: int) -> Answer:
        """What a request asks for; `row` tells repeats of a prompt apart."""
        options = normalize_gen_kwargs(options, self.max_gen_toks)
        if options.get("num_beams") == 1:
            del options["num_beams"]
        for name in options:
            if name not in GENERATION:
                known = ", ".join(GENERATION)
                raise InputError(
                    f"generation_kwargs: {name} {short(options[name])} is not supported; known are {known}"
                )
        eos = self._text.decode([self.eot_token_id], skip_special_tokens=False)
        stop = [s for s in handle_stop_sequences(options["until"], eos) if s]
        new, prompt = options["max_gen_toks"], self.tok_encode(context) or [self.prefix_token_id]
        if new >= self.max_length:
            raise InputError(f"max_gen_toks {new} leaves no room for a prompt: max_length is {self.max_length}")
        temperature = options.get("temperature", 0.0) if options["do_sample"] else 0.0
        request = Request(
            key,
            prompt[new - self.max_length :],
            mode=self.mode,
            max_new_tokens=new,
            temperature=temperature,
            top_k=options.get("top_k") or None if temperature else None,
            top_p=options.get("top_p") if temperature else None,
            eos_token_id=self._eos,
            seed=zlib.crc32(context.encode(), self._seed),
            row=row,
            **self._decoding,
        )
        return Answer(request.checked(self.model.config.vocab_size, self.model.two_towers), stop)

    def _count(self, answer: Answer) -> None:
        self.tally.tokens += len(answer.tokens)
        self.tally.denoiser_forwards += answer.forwards[0]
        self.tally.context_forwards += answer.forwards[1]
        self.tally.add_errors([answer.error])


def _known() -> list[str]:
    """What `--model_args` may hold."""
    own = [name for name in TwoTowerLM.__init__.__kwdefaults__ if name != "name"]
    return ["pretrained", "dtype", "context_devices", "denoiser_devices", "mesh", *own, *DECODING]


def load(
    name: str, dtype: str = "bfloat16", placement: Placement | None = None
) -> tuple[tt.Model, Tokenizer, int | None]:
    """A model, its tokenizer, and what begins its texts: the id of the BOS token, if it has one.

    Args:
      name: as for `tt.load`.
      dtype: likewise.
      placement: likewise; both towers share all devices by default.

    Raises:
      InputError: the model cannot be loaded, or has no tokenizer.
    """
    folder = sources.locate(name)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise InputError(f"{name} has no tokenizer.json, and the harness's tasks are text")
    placement = shared(placement or Placement(), not sources.config_alone(folder)[1])
    return tt.load(folder, dtype=dtype, placement=placement), tokenizer, _bos(folder, tokenizer)


def _bos(folder: Path, tokenizer: Tokenizer) -> int | None:
    file = folder / "tokenizer_config.json"
    try:
        bos = json.loads(file.read_text(encoding="utf-8")).get("bos_token") if file.is_file() else None
    except (ValueError, AttributeError) as error:
        raise InputError(f"{file} is no tokenizer's configuration: {error}") from None
    bos = bos.get("content") if isinstance(bos, dict) else bos
    return tokenizer.token_to_id(bos) if isinstance(bos, str) else None

"""The face: load a model, generate text with it."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from twotower_jax import inputs, memory, sources, two_tower
from twotower_jax.config import Config
from twotower_jax.decoding import autoregressive, diffusion
from twotower_jax.decoding.sampling import Sampler
from twotower_jax.decoding.unmasking import ThresholdUnmasking
from twotower_jax.errors import InputError
from twotower_jax.parameters import flatten, unflatten
from twotower_jax.state import state_bytes


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a run gave, a list entry a row.

    Attributes:
      tokens: the new tokens, up to and including the first EOS.
      forwards: denoiser passes that the row needed; in AR passes of the context tower, the prompt's one among them.
      errors: None, or why the row ended early; its tokens are those before.
      seconds: of the run, all rows together, without compilation.
      compile_seconds: 0 if the program was there already.
    """

    tokens: list[list[int]]
    forwards: list[int]
    errors: list[str | None]
    seconds: float
    compile_seconds: float


def load(model: str | Path, dtype: Any = "bfloat16") -> "Model":
    """Loads NVIDIA's layout or a converted checkpoint, of a TwoTower or a backbone.

    Args:
      model: a folder, the name of a shipped model (`demo`), or a Hugging Face id.
      dtype: of weights and activations, bfloat16 or float32; scan, norms, router, softmax and logits are always
        float32.

    Raises:
      InputError: a line for everything that is wrong with the folder, or the model does not fit the device.
    """
    dtype = inputs.dtype(dtype)
    folder = sources.open_folder(sources.locate(model))
    description = two_tower.describe(folder.config, folder.two_towers)
    dtypes = {path: jnp.dtype(jnp.float32) if p.float32 else dtype for path, p in flatten(description)}
    size = sum(math.prod(folder.config.shape(p.axes)) * dtypes[path].itemsize for path, p in flatten(description))
    device = jax.local_devices()[0]
    memory.require(size, device, f"{model} in {dtype.name}")
    params = {}
    for path in tqdm(dtypes, desc=f"loading {model}", unit="arrays", delay=2, disable=None):
        params[path] = jax.device_put(folder.read(path).astype(dtypes[path]), device)
    return Model(folder.config, unflatten(params))


def bucket(length: int) -> int:
    """The next of few lengths, at most a quarter longer (or 16), so that few programs are compiled."""
    step = max(16, (1 << (length - 1).bit_length()) // 8) if length > 1 else 16
    return -(-length // step) * step


@dataclasses.dataclass(frozen=True)
class _Request:
    """A checked batch: prompts padded to `width` on the device, a state with room for `capacity` tokens a row."""

    prompts: list[np.ndarray]
    limit: int
    capacity: int
    width: int
    rows: np.ndarray
    seed: np.uint32
    eos: np.ndarray


class Model:
    """A TwoTower, or a backbone (AR only), ready to run. `load` makes one.

    Attributes:
      config: dimensions.
      params: see `two_tower`.
    """

    def __init__(self, config: Config, params: dict):
        self.config, self.params = config, params
        self._programs: dict[Any, Callable] = {}

    @property
    def two_towers(self) -> bool:
        """Whether there is a denoiser."""
        return "denoiser" in self.params

    def generate_mask_diffusion(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        block_size: int = 16,
        steps_per_block: int = 16,
        confidence_threshold: float = 0.8,
        mask_token_id: int = 3,
        temperature: float = 0.0,
        top_k: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int = 0,
        rows: Sequence[int] | None = None,
    ) -> Generation:
        """Mask diffusion, block by block (paper, section 3). Every row gives what it would give alone.

        Args:
          prompts: token ids, a list for each row.
          max_new_tokens: new tokens a row; need not be a multiple of the block size.
          block_size: positions denoised together. A model writes nonsense above the size it was trained for.
          steps_per_block: most denoiser passes a block.
          confidence_threshold: predictions above this probability are committed, in [0, 1].
          mask_token_id: the id of `[MASK]`. Prompts may hold it.
          temperature: 0 is greedy.
          top_k: draw from the k most probable tokens.
          eos_token_id: id or ids that end a row.
          seed: of the random draws, with the row's number and the position.
          rows: the rows' numbers, 0, 1, 2... by default; a row alone, given its number, draws what it drew in a batch.
        """
        self._need_denoiser("generate_mask_diffusion")
        vocab = self.config.vocab_size
        rules = diffusion.Diffusion(
            sampler=self._sampler(temperature, top_k, None),
            unmasking=ThresholdUnmasking(
                threshold=np.float32(inputs.number("confidence_threshold", confidence_threshold, 0, 1)),
                steps=np.int32(inputs.whole("steps_per_block", steps_per_block, 1, 2**31 - 1)),
            ),
            mask_id=np.int32(inputs.whole("mask_token_id", mask_token_id, 0, vocab - 1)),
            block_size=inputs.whole("block_size", block_size, 1, 2**31 - 1),
        )
        limit = inputs.whole("max_new_tokens", max_new_tokens, 0, 2**31 - 1)
        size = rules.block_size
        blocks, most = -(-limit // size), -(-bucket(limit) // size)
        request = self._request(prompts, limit, most * size, rows, seed, eos_token_id)
        return self._generate(diffusion.generate, rules, request, blocks, max_blocks=most)

    def generate_ar(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int = 0,
        rows: Sequence[int] | None = None,
    ) -> Generation:
        """The context tower alone, a token a step. Arguments as for `generate_mask_diffusion`; `top_p` is the mass of
        the nucleus that is drawn from, in (0, 1].
        """
        sampler = self._sampler(temperature, top_k, top_p)
        return self._one_by_one(False, sampler, prompts, max_new_tokens, rows, seed, eos_token_id)

    def generate_mock_ar(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int = 0,
        rows: Sequence[int] | None = None,
    ) -> Generation:
        """The denoiser as a next-token predictor, without time conditioning: a diagnostic of its training, equal to AR
        while it equals the backbone. Arguments as for `generate_ar`.
        """
        self._need_denoiser("generate_mock_ar")
        sampler = self._sampler(temperature, top_k, top_p)
        return self._one_by_one(True, sampler, prompts, max_new_tokens, rows, seed, eos_token_id)

    def context_logits(self, ids: Sequence[int]) -> np.ndarray:
        """The context tower over one sequence: (L,) ids -> (L, V) float32."""
        ids = inputs.token_ids("ids", ids, self.config.vocab_size)
        capacity = bucket(len(ids))
        padded = np.zeros((1, capacity), np.int32)
        padded[0, : len(ids)] = ids
        what = f"a prompt of {len(ids)} tokens with logits for each"
        self._require_memory(1, capacity, 4 * capacity * self.config.vocab_size, what)
        arrays = (padded, np.asarray([len(ids)], np.int32))
        program, _ = self._program(two_tower.context_logits, arrays, {"capacity": capacity}, what)
        return np.asarray(program(self.params, *arrays))[0, : len(ids)]

    def _need_denoiser(self, name: str) -> None:
        if not self.two_towers:
            raise InputError(
                f"{name} needs a denoiser, and this model is a backbone: it has generate_ar and context_logits only "
                "(twotower convert --two-towers makes two towers of it, to be trained)"
            )

    def _sampler(self, temperature: float, top_k: int | None, top_p: float | None) -> Sampler:
        temperature = np.float32(inputs.number("temperature", temperature, 0, 1e6))
        top_k = None if top_k is None else inputs.whole("top_k", top_k, 1)
        top_p = None if top_p is None else inputs.number("top_p", top_p, 0, 1, open_low=True)
        if top_p == 1:  # everything, whatever a float32 sum of probabilities comes to
            top_p = None
        if temperature == 0:
            return Sampler(temperature=np.float32(1), greedy=True)
        return Sampler(temperature, None if top_p is None else np.float32(top_p), top_k)

    def _one_by_one(self, mock, sampler, prompts, max_new_tokens, rows, seed, eos_token_id) -> Generation:
        limit = inputs.whole("max_new_tokens", max_new_tokens, 0, 2**31 - 1)
        room = bucket(limit)
        request = self._request(prompts, limit, room, rows, seed, eos_token_id)
        return self._generate(autoregressive.generate, sampler, request, limit, max_tokens=room, mock=mock)

    def _request(self, prompts, limit, room, rows, seed, eos_token_id) -> _Request:
        vocab = self.config.vocab_size
        prompts = inputs.prompts(prompts, vocab)
        longest = max(map(len, prompts), default=1)
        return _Request(
            prompts=prompts,
            limit=limit,
            capacity=bucket(longest + room),
            width=bucket(longest),
            rows=inputs.row_numbers(rows, len(prompts)),
            seed=np.uint32(inputs.whole("seed", seed, 0, 2**32 - 1)),
            eos=inputs.stop_ids(eos_token_id, vocab),
        )

    def _generate(self, function: Callable, rules: Any, request: _Request, units: int, **static: Any) -> Generation:
        """Runs a decoding loop; `units` are its blocks or tokens."""
        r = request
        if not r.prompts or r.limit == 0:
            count = len(r.prompts)
            return Generation([[] for _ in range(count)], [0] * count, [None] * count, 0.0, 0.0)
        what = f"{len(r.prompts)} rows of up to {max(map(len, r.prompts))} prompt tokens and {r.limit} new ones"
        self._require_memory(len(r.prompts), r.capacity, 4 * len(r.prompts) * r.capacity, what)
        padded = np.zeros((len(r.prompts), r.width), np.int32)
        for row, ids in enumerate(r.prompts):
            padded[row, : len(ids)] = ids
        count = np.asarray([len(ids) for ids in r.prompts], np.int32)
        arrays = (rules, padded, count, r.rows, r.seed, r.eos, np.int32(units))
        program, compile_seconds = self._program(function, arrays, static | {"capacity": r.capacity}, what)
        start = time.perf_counter()
        tokens, length, forwards, failed = map(np.asarray, program(self.params, *arrays))
        seconds = time.perf_counter() - start
        return Generation(
            tokens=[_cut(row[:n], r.limit, r.eos) for row, n in zip(tokens, length, strict=True)],
            forwards=forwards.tolist(),
            errors=["a logit was not finite; the row ends before it" if bad else None for bad in failed],
            seconds=seconds,
            compile_seconds=compile_seconds,
        )

    def _program(self, function: Callable, arrays: Any, static: dict, what: str) -> tuple[Callable, float]:
        """The compiled function for arrays of these shapes, and the seconds that it took to compile just now."""
        leaves, structure = jax.tree.flatten(arrays)
        shapes = tuple((np.shape(leaf), np.result_type(leaf)) for leaf in leaves)
        key = (function, tuple(static.items()), structure, shapes)
        if key in self._programs:
            return self._programs[key], 0.0
        start = time.perf_counter()
        jitted = jax.jit(functools.partial(function, self.config, **static))
        program = jitted.lower(self.params, *arrays).compile()
        if (analysis := program.memory_analysis()) is not None:
            needed = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
            memory.require(needed, self._device, what)
        self._programs[key] = program
        return program, time.perf_counter() - start

    @property
    def _device(self) -> jax.Device:
        return next(iter(self.params["context"]["head"].devices()))

    def _require_memory(self, rows: int, capacity: int, extra: int, what: str) -> None:
        """Refuses before anything is compiled what the context's state alone makes too large."""
        if capacity >= 2**31:
            raise InputError(f"{what}: positions end at {2**31 - 1}")
        needed = state_bytes(self.config, rows, capacity, two_tower.dtype_of(self.params)) + extra
        memory.require(needed, self._device, what)


def _cut(tokens: np.ndarray, limit: int, eos: np.ndarray) -> list[int]:
    """A row's tokens up to the limit and its first EOS, that one included."""
    tokens = tokens[:limit]
    ends = np.flatnonzero(np.isin(tokens, eos))
    return tokens[: ends[0] + 1 if len(ends) else None].tolist()

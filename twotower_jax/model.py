"""The face: load a model, generate text with it."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from twotower_jax import distributed, inputs, memory, sharding, sources, two_tower
from twotower_jax.config import Config
from twotower_jax.engine import sizes as engine_sizes
from twotower_jax.engine.request import Event, Request, common, counted, worth_sharing
from twotower_jax.engine.rows import Kinds
from twotower_jax.engine.scheduler import Engine
from twotower_jax.errors import InputError, short
from twotower_jax.parameters import flatten, parameter_bytes, unflatten
from twotower_jax.placement import Group, Placement, Towers, place
from twotower_jax.programs import Program, Programs, keep_between_runs
from twotower_jax.scoring import pairs as scoring_pairs
from twotower_jax.scoring.bound import Bound
from twotower_jax.scoring.score import BY, Scores, score
from twotower_jax.shapes import Ahead, TowersOfShapes, shapes_of
from twotower_jax.sharding import LOGITS, ROWS
from twotower_jax.state import state_bytes


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a run gave, a list entry a row.

    Attributes:
      tokens: the new tokens, up to and including the first EOS.
      forwards: denoiser passes that the row needed; in AR passes of the context tower, the prompt's one among them; in
        verified decoding both.
      errors: None, or why the row ended early; its tokens are those before.
      seconds: of the run, all rows together, without compilation.
      compile_seconds: 0 if the program was there already.
    """

    tokens: list[list[int]]
    forwards: list[int]
    errors: list[str | None]
    seconds: float
    compile_seconds: float


def load(model: str | Path, dtype: Any = "bfloat16", placement: Placement | None = None) -> "Model":
    """Loads NVIDIA's layout or a converted checkpoint, of a TwoTower or a backbone, straight onto its devices.

    From then on JAX keeps what it compiles in the user's cache folder, unless it has been given another one.

    Args:
      model: a folder, the name of a shipped model (`demo`), or a Hugging Face id.
      dtype: of weights and activations, bfloat16 or float32; scan, norms, router, softmax and logits are always
        float32.
      placement: the towers' devices, and how a tower is divided over them; on two or more devices half are the context
        tower's by default.

    Raises:
      InputError: a line for everything that is wrong with the folder; the model does not fit the devices, or cannot be
        divided so.
    """
    dtype = inputs.dtype(dtype)
    keep_between_runs()
    with distributed.checked_together() as said:
        folder = sources.open_folder(sources.locate(model))
        if distributed.joined():
            said.append(sources.fingerprint(folder))
        towers = place(placement or Placement(), folder.config, folder.two_towers)
        description = two_tower.describe(folder.config, folder.two_towers)
        for group in towers.groups:
            here = [tower for tower in description if towers.of(tower) is group]
            size = sum(parameter_bytes(group.config, description[tower], dtype) for tower in here)
            whose = "" if len(here) == len(description) else f"'s {here[0]} tower"
            for device in group.local_devices:
                memory.require(size, device, f"{model}{whose} in {dtype.name}")
    params = {}
    with distributed.checked_together():
        for path, p in tqdm(list(flatten(description)), desc=f"loading {model}", unit="arrays", delay=2, disable=None):
            params[path] = towers.of(path[0]).parameter(p, p.dtype_in(dtype), functools.partial(folder.read, path))
    return Model(folder.config, unflatten(params), towers, sources.identity(folder))


class Model:
    """A TwoTower, or a backbone (AR only), ready to run. `load` makes one.

    Attributes:
      config: dimensions.
      params: see `two_tower`.
      towers: the devices that the parameters are on.
      programs: those that are compiled.
      identity: what tells the model from others; empty if it was not loaded.
    """

    def __init__(
        self,
        config: Config,
        params: dict,
        towers: Towers | None = None,
        identity: str = "",
        programs: Programs | Ahead | None = None,
    ):
        self.config, self.params, self.identity = config, params, identity
        one_device = Placement((0,), (0,) if self.two_towers else None)
        self.towers = towers or place(one_device, config, self.two_towers)
        self.programs = programs or Programs()

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
        confidence_threshold: float | None = None,
        mask_token_id: int = 3,
        temperature: float = 0.0,
        top_k: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int = 0,
        rows: Sequence[int] | None = None,
        unmasking: str | None = None,
    ) -> Generation:
        """Mask diffusion, block by block (paper, section 3). Every row gives what it would give alone.

        Args:
          prompts: token ids, a list for each row.
          max_new_tokens: new tokens a row; need not be a multiple of the block size.
          block_size: positions denoised together. A model writes nonsense above the size it was trained for.
          steps_per_block: most denoiser passes a block.
          confidence_threshold: predictions above this probability are committed, in [0, 1]; 0.8 by default.
          mask_token_id: the id of `[MASK]`. Prompts may hold it.
          temperature: 0 is greedy.
          top_k: draw from the k most probable tokens.
          eos_token_id: id or ids that end a row.
          seed: of the random draws, with the row's number and the position.
          rows: the rows' numbers, 0, 1, 2... by default; a row alone, given its number, draws what it drew in a batch.
          unmasking: another rule than the threshold, `NAME` or `NAME=NUMBER`; see `decoding.unmasking`.
        """
        self._need_denoiser("generate_mask_diffusion")
        asked = {"max_new_tokens": max_new_tokens, "block_size": block_size}
        asked |= {"steps_per_block": steps_per_block, "confidence_threshold": confidence_threshold}
        asked |= {"unmasking": unmasking}
        asked |= {"temperature": temperature, "top_k": top_k, "eos_token_id": eos_token_id, "seed": seed}
        return self.generate("diffusion", prompts, rows=rows, mask_token_id=mask_token_id, **asked)

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
        asked = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        return self.generate("ar", prompts, rows=rows, eos_token_id=eos_token_id, seed=seed, **asked)

    def generate_verified(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 128,
        block_size: int = 16,
        draft_passes: int | None = None,
        unmasking: str | None = None,
        confidence_threshold: float | None = None,
        accept_probability: float | None = None,
        mask_token_id: int = 3,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        seed: int = 0,
        rows: Sequence[int] | None = None,
    ) -> Generation:
        """What `generate_ar` writes, in blocks that the denoiser drafts and the context tower verifies in one pass.

        The other arguments are those of `generate_mask_diffusion` and `generate_ar`.

        Args:
          draft_passes: most denoiser passes a block; None: as many as are expected to pay.
          accept_probability: drafts that AR gives at least this probability are accepted too, so that the text is not
            AR's own any more; None for no others.
        """
        self._need_denoiser("generate_verified")
        asked = {"max_new_tokens": max_new_tokens, "block_size": block_size}
        asked |= {"draft_passes": draft_passes, "unmasking": unmasking, "confidence_threshold": confidence_threshold}
        asked |= {"accept_probability": accept_probability, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        asked |= {"eos_token_id": eos_token_id, "seed": seed, "mask_token_id": mask_token_id}
        return self.generate("verified", prompts, rows=rows, **asked)

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
        asked = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        return self.generate("mock-ar", prompts, rows=rows, eos_token_id=eos_token_id, seed=seed, **asked)

    def score(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        by: str = "context",
        per_token: bool = False,
        samples: int = 16,
        block_size: int = 16,
        mask_token_id: int = 3,
        seed: int = 0,
    ) -> Scores:
        """log p(continuation | context): exactly, by the context tower, or a lower bound on it by the denoiser.

        What pairs begin with in common is read once. In float32 a pair's score does not depend on the others.

        Args:
          pairs: a context and its continuation as token ids, one or more of each.
          by: "context"; or "denoiser": the bound of masked diffusion with the linear schedule (paper, training), block
            by block from the continuation's beginning, the tokens before a block being given.
          per_token: whether each token's part is wanted.
          samples: masks of each block, two or more; the standard error falls with their root.
          block_size: positions denoised together.
          mask_token_id: the id of `[MASK]`.
          seed: of the masks, with the context's tokens.

        Raises:
          InputError: a pair or a number is wrong; there is no denoiser; a text does not fit.
        """
        vocab = self.config.vocab_size
        with distributed.checked_together() as said:
            if by not in BY:
                raise InputError(f"by must be {' or '.join(BY)}, not {short(by)}")
            if by == "denoiser":
                self._need_denoiser("score by the denoiser")
            samples = inputs.whole("samples", samples, 2, 2**16)
            block_size = inputs.whole("block_size", block_size, 1, 2**16)
            mask_token_id = inputs.whole("mask_token_id", mask_token_id, 0, vocab - 1)
            seed = inputs.whole("seed", seed, 0, 2**32 - 1)
            checked = scoring_pairs.checked(pairs, vocab)
            bound = Bound(samples, mask_token_id, seed) if by == "denoiser" else None
            said += [bound, block_size, *((pair.context.tolist(), pair.continuation.tolist()) for pair in checked)]
        options = {"per_token": per_token, "block_size": block_size, "bound": bound}
        return score(self.towers, self.programs, self.params, checked, **options)

    def engine(
        self,
        *,
        longest: int,
        block_size: int = 16,
        waiting: int | None = None,
        slots: int | None = None,
        memory: int | None = None,
        mask_token_id: int = 3,
        watches: bool = False,
        prefix: Sequence[int] = (),
        kinds: Kinds | None = None,
    ) -> Engine:
        """What runs many requests at once, each at its own pace; see `engine.Engine`.

        Args:
          longest: positions of the longest request, `Request.positions`.
          block_size: the largest block of a request.
          waiting: requests that are to come, if it is known.
          slots: rows that are written at a time; by default as many as fit and pay.
          memory: bytes of each device for them; by default most of what is free.
          mask_token_id: the id of `[MASK]`.
          watches: whether events bring the blocks that they are of, for which the host waits each round.
          prefix: tokens that prompts begin with, which are read once.
          kinds: what requests will ask, if it is known.

        Raises:
          InputError: they do not fit.
        """
        dtype = two_tower.dtype_of(self.params)
        sizes = {"longest": longest, "block_size": block_size, "waiting": waiting, "slots": slots, "room": memory}
        slots, capacity, line = engine_sizes.plan(self.towers, dtype, **sizes)
        made = {"slots": slots, "capacity": capacity, "block_size": block_size, "mask_id": mask_token_id}
        made |= {"watches": watches, "prefix": prefix, "kinds": kinds}
        return Engine(self.towers, self.programs, self.params, about=line, **made)

    def engine_for(self, requests: Sequence[Request], **made: Any) -> Engine:
        """An engine of the size of some checked requests, one or more, which knows what they begin with and ask; its
        programs begin to compile at once.

        Args:
          requests: all that are to come.
          **made: other arguments of `engine`.
        """
        self.rehearse(requests, **made)
        return self.engine(**_asked(requests), **made)

    def rehearse(self, requests: Sequence[Request], **made: Any) -> None:
        """Has the programs of an engine for these begin to compile, all of them, without waiting; see `engine_for`."""
        towers, params = TowersOfShapes.like(self.towers), shapes_of(self.params)
        shapes = Model(self.config, params, towers, programs=Ahead(self.programs))
        shapes.engine(**_asked(requests), **made).rehearse(requests)

    def stream(
        self, requests: Iterable[Request], *, slots: int | None = None, mask_token_id: int = 3
    ) -> Iterator[Event]:
        """Runs requests, and gives what they write as it comes: a block, or up to 16 tokens, at a time.

        Args:
          requests: with keys of their own, all of which are taken and checked first; every row gives what it would give
            alone (in bfloat16 but for near ties).
          slots: rows that are written at a time; by default as many as fit and pay.
          mask_token_id: the id of `[MASK]`.

        Raises:
          InputError: a request is wrong, which its line names; nothing has run then.
        """
        if isinstance(requests, Request) or not isinstance(requests, Iterable):
            raise InputError(f"requests are a list of tt.Request, not {short(requests)}")
        checked = []
        for request in requests:
            if not isinstance(request, Request):
                raise InputError(f"requests are tt.Request, not {short(request)}")
            try:
                hash(request.key)
                checked.append(request.checked(self.config.vocab_size, self.two_towers))
            except InputError as error:
                raise InputError(f"request {short(request.key)}: {error}") from None
            except TypeError:
                raise InputError(f"request {short(request.key)}: a key must be hashable") from None
        if len({request.key for request in checked}) < len(checked):
            raise InputError("two requests have the same key")
        slots = None if slots is None else inputs.whole("slots", slots, 1, 2**20)
        return self._run(checked, inputs.whole("mask_token_id", mask_token_id, 0, self.config.vocab_size - 1), slots)

    def _run(
        self, requests: list[Request], mask_token_id: int, slots: int | None = None, watches: bool = False
    ) -> Iterator[Event]:
        """Checked requests, by an engine of their size."""
        if not requests:
            return iter(())
        engine = self.engine_for(requests, slots=slots, mask_token_id=mask_token_id, watches=watches)
        return engine.run(requests)

    def context_logits(self, ids: Sequence[int]) -> np.ndarray:
        """The context tower over one sequence: (L,) ids -> (L, V) float32."""
        ids = inputs.token_ids("ids", ids, self.config.vocab_size)
        capacity = inputs.bucket(len(ids))
        group = self.towers.context
        rows = group.row_shards  # copies: every device has one
        padded = np.zeros((rows, capacity), np.int32)
        padded[:, : len(ids)] = ids
        what = f"a prompt of {len(ids)} tokens with logits for each"
        self._require_memory(group, 1, capacity, 4 * capacity * group.config.vocab_size, what)
        program = Program(two_tower.context_logits, (sharding.specs(self.config, "context"), ROWS, ROWS), LOGITS)
        arrays = ({"context": self.params["context"]}, *group.put((padded, np.full(rows, len(ids), np.int32)), ROWS))
        return group.fetch(self.programs.run(group, program, *arrays, what=what, capacity=capacity))[0, : len(ids)]

    def _need_denoiser(self, name: str) -> None:
        if not self.two_towers:
            raise InputError(
                f"{name} needs a denoiser, and this model is a backbone: it has generate_ar, context_logits "
                "and score by the context tower only "
                "(twotower convert --two-towers makes two towers of it, to be trained)"
            )

    def generate(
        self,
        mode: str,
        prompts: Sequence[Sequence[int]],
        *,
        mask_token_id: int = 3,
        rows: Sequence[int] | None = None,
        watch: Callable[[Event], None] | None = None,
        **asked: Any,
    ) -> Generation:
        """What the method of a mode, `diffusion`, `ar`, `mock-ar` or `verified`, does.

        Args:
          mode: its name.
          prompts: token ids, a list for each row.
          mask_token_id: the id of `[MASK]`.
          rows: the rows' numbers.
          watch: is given every event as it is heard, its key being the prompt's place, with its block as it was
            denoised.
          **asked: other fields of `Request`.
        """
        vocab, asked = self.config.vocab_size, {"mode": mode, **asked}
        with distributed.checked_together() as said:
            prompts = inputs.prompts(prompts, vocab)
            numbers = inputs.row_numbers(rows, len(prompts)).tolist()
            mask_token_id = inputs.whole("mask_token_id", mask_token_id, 0, vocab - 1)
            Request(0, [0], **asked).checked(
                vocab, self.two_towers
            )  # says what is wrong where there are no prompts too
            requests = [
                Request(i, ids, row=row, **asked).checked(vocab, self.two_towers)
                for i, (ids, row) in enumerate(zip(prompts, numbers, strict=True))
            ]
            said += [mask_token_id, *map(str, requests)]
        compiled, start = self.programs.compile_seconds, time.perf_counter()
        tokens: list[list[int]] = [[] for _ in requests]
        forwards, errors = [0] * len(requests), [None] * len(requests)
        for event in self._run(requests, mask_token_id, watches=watch is not None):
            if watch is not None:
                watch(event)
            tokens[event.key] += event.tokens
            forwards[event.key] = counted(mode, event.denoiser_forwards, event.context_forwards)
            errors[event.key] = event.error
        compile_seconds = self.programs.compile_seconds - compiled
        seconds = time.perf_counter() - start - compile_seconds
        return Generation(tokens, forwards, errors, seconds, compile_seconds)

    def _require_memory(self, group: Group, rows: int, capacity: int, extra: int, what: str) -> None:
        """Refuses before anything is compiled what the context's state alone makes too large."""
        if capacity >= 2**31:
            raise InputError(f"{what}: positions end at {2**31 - 1}")
        rows = -(-rows // group.row_shards)
        needed = state_bytes(group.config, rows, capacity, two_tower.dtype_of(self.params)) + extra
        with distributed.checked_together():
            for device in group.local_devices:
                memory.require(needed, device, what)


def _asked(requests: Sequence[Request]) -> dict[str, Any]:
    """What `Model.engine` is to be told of requests, one or more."""
    read_first = [request.prompt[: request.read_first] for request in requests]
    return {
        "longest": max(request.positions for request in requests),
        "block_size": max(request.block for request in requests),
        "waiting": len(requests),
        "kinds": functools.reduce(Kinds.including, requests, Kinds()),
        "prefix": worth_sharing(functools.reduce(common, read_first), len(requests)),
    }

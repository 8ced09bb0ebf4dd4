"""What a model needs on devices that need not be there: every program of a generation, compiled for them.

Bytes are those of the compiler's own analysis. Parameters, both copies of the context's state and what is on its way
between towers are counted as `generation` holds them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from twotower_jax import compiled_text, generation, sharding, two_tower
from twotower_jax.analyses import analysis
from twotower_jax.config import Config
from twotower_jax.decoding.autoregressive import MockAR
from twotower_jax.decoding.diffusion import Diffusion
from twotower_jax.decoding.progress import Request, nothing_written
from twotower_jax.decoding.sampling import Sampler
from twotower_jax.decoding.unmasking import ThresholdUnmasking
from twotower_jax.parameters import parameter_bytes
from twotower_jax.placement import Group, Towers
from twotower_jax.programs import Program
from twotower_jax.sharding import WHOLE


@dataclasses.dataclass(frozen=True)
class Wish:
    """A generation.

    Attributes:
      mode: `diffusion`, `ar` or `mock-ar`.
      rows: of the batch.
      prompt: tokens of the longest prompt.
      new_tokens: of a row.
      block_size: S.
      dtype: of the model.
    """

    mode: str
    rows: int
    prompt: int
    new_tokens: int
    block_size: int
    dtype: np.dtype

    @property
    def width(self) -> int:
        return generation.bucket(self.prompt)

    @property
    def sizes(self) -> dict[str, int]:
        unit = self.block_size if self.mode == "diffusion" else 1
        return generation.sizes(self.prompt, self.new_tokens, unit)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program on one device of its group; all sizes in bytes.

    Attributes:
      arguments, outputs, temporaries: as the compiler counts them; outputs without those in an argument's place.
      collectives: of each kind, how many there are and what they give the device when each runs once.
      copies: operations that make an array of the shape of experts' weights.
      seconds: of compilation, which may have been an earlier run's.
    """

    arguments: int
    outputs: int
    temporaries: int
    collectives: dict[str, tuple[int, int]]
    copies: list[str]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """Of each group of devices, `context` and `denoiser` or `both`, what one device needs; all sizes in bytes.

    Attributes:
      programs: by the group's name and their own.
      parameters, states: what stays there.
      needed: the most that is there at one time.
      moved: what goes between the towers for a block of one row: by `caches`, `mamba` and `tokens`.
    """

    programs: dict[str, dict[str, Compiled]]
    parameters: dict[str, int]
    states: dict[str, int]
    needed: dict[str, int]
    moved: dict[str, int]


class _Compiler:
    """Compiles programs for arrays that are shapes alone, and gives the shapes of their results."""

    def __init__(self, compilers: str, say: Callable[[str], None]):
        self._compilers, self._say = compilers, say
        self.compiled: dict[str, dict[str, Compiled]] = {}

    def __call__(self, group: Group, home: str, name: str, program: Program, *arrays: Any, **sizes: Any) -> Any:
        lowered = program.on(group, **sizes).lower(*arrays)
        found = analysis(lowered, self._compilers)
        c = group.config
        self.compiled.setdefault(home, {})[name] = Compiled(
            arguments=found.arguments,
            outputs=found.outputs,
            temporaries=found.temporaries,
            collectives=compiled_text.collectives(found.text),
            copies=compiled_text.copies(found.text, c.hidden_size, c.expert_width) if c.experts else [],
            seconds=found.seconds,
        )
        self._say(f"{home}: {name}, compiled in {found.seconds:.0f} s{', by an earlier run' if found.kept else ''}")
        return _placed(group, lowered.out_info, program.outputs)


def _placed(group: Group, shapes: Any, specs: Any) -> Any:
    """Shapes with the shardings of a group."""
    return group.each(lambda x, home: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home), shapes, specs)


def _parameters(group: Group, description: dict, dtype: np.dtype) -> dict:
    def one(p):
        shape = jax.ShapeDtypeStruct(group.shape(p), jnp.float32 if p.float32 else dtype)
        return _placed(group, shape, sharding.spec(p))

    return jax.tree.map(one, description)


def _bytes(group: Group, tree: Any, specs: Any) -> int:
    """What one device holds of shapes."""
    total = 0
    for leaf in jax.tree.leaves(_placed(group, tree, specs)):
        total += int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
    return total


def _rules(wish: Wish) -> Any:
    number, whole = np.float32(0), np.int32(0)
    sampler = Sampler.of(0)
    if wish.mode == "ar":
        return sampler
    if wish.mode == "mock-ar":
        return MockAR(sampler)
    return Diffusion(sampler, ThresholdUnmasking(number, whole), whole, wish.block_size)


def _request(rows: int, width: int) -> Request:
    column = np.zeros(rows, np.int32)
    prompts = jax.ShapeDtypeStruct((rows, width), np.int32)
    return Request(prompts, column, column, np.uint32(0), np.zeros(16, np.int32), np.int32(0))


def plan(
    config: Config, towers: Towers, wish: Wish, compilers: str, say: Callable[[str], None] = lambda line: None
) -> Plan:
    """Compiles every program of a generation.

    Args:
      config: the model's dimensions.
      towers: the devices.
      wish: the generation.
      compilers: for the devices: their names and versions, and what they compile for.
      say: is told of each program that is compiled.
    """
    compiler = _Compiler(compilers, say)
    description = two_tower.describe(config, two_towers=True)
    rules = _rules(wish)
    if towers.split and wish.mode != "ar":
        return _plan_apart(towers, wish, rules, description, compiler)
    names = ["context"] if wish.mode == "ar" else ["context", "denoiser"]
    group, home = towers.context, "context" if wish.mode == "ar" else "both"
    params = _parameters(group, {name: description[name] for name in names}, wish.dtype)
    rows = -(-wish.rows // group.row_shards) * group.row_shards
    request = _placed(group, _request(rows, wish.width), generation.REQUEST)
    program = generation.alone(config) if wish.mode == "ar" else generation.fused(config)
    placed = _placed(group, rules, WHOLE)
    compiler(group, home, "generate", program, params, placed, request, **wish.sizes)
    own = compiler.compiled[home]["generate"]
    held = sum(parameter_bytes(group.config, description[name], wish.dtype) for name in description)
    held = held if not towers.split else parameter_bytes(group.config, description["context"], wish.dtype)
    return Plan(compiler.compiled, {home: held}, {}, {home: held + own.outputs + own.temporaries}, {})


def _plan_apart(towers: Towers, wish: Wish, rules: Any, description: dict, compile_: _Compiler) -> Plan:
    context, denoiser = towers.context, towers.denoiser
    config, shards = context.whole, context.row_shards
    halves = 2 if wish.rows > shards else 1
    rows = -(-wish.rows // (halves * shards)) * shards
    program = generation.apart(config)
    states = sharding.state_spec(config)
    params = {
        name: _parameters(towers.of(name), {name: description[name]}, wish.dtype) for name in ("context", "denoiser")
    }
    there, here = (_placed(group, rules, WHOLE) for group in towers.groups)
    asked, given = (_placed(group, _request(rows, wish.width), generation.REQUEST) for group in towers.groups)

    def moved(state: Any, news: Any) -> Any:
        return _placed(denoiser, two_tower.with_mamba(news, state), states)

    sizes = {"capacity": wish.sizes["capacity"]}
    state, news = compile_(context, "context", "prefill", program["prefill"], params["context"], there, asked, **sizes)
    came = moved(state, news)
    first = _bytes(denoiser, came, states)
    waiting = (halves - 1) * _bytes(context, news, two_tower.caches(states))  # to be moved, of the half before
    caches = compile_(
        denoiser, "denoiser", "receive", program["receive"], two_tower.caches(came), dtype=wish.dtype, **sizes
    )
    copy = two_tower.with_mamba(caches, came)
    progress = _placed(denoiser, nothing_written(rows, wish.sizes["room"]), generation.PROGRESS)
    progress, written = compile_(
        denoiser, "denoiser", "write", program["write"], params["denoiser"], here, copy, progress, given
    )
    there_written = _placed(context, written, generation.WRITTEN)
    state, news = compile_(context, "context", "read", program["read"], params["context"], state, *there_written)
    came = moved(state, news)
    later = _bytes(denoiser, came, states)
    compile_(denoiser, "denoiser", "absorb", program["absorb"], caches, two_tower.caches(came))

    state_bytes = _bytes(context, state, states)
    made = compile_.compiled
    weights = {name: parameter_bytes(towers.of(name).config, description[name], wish.dtype) for name in params}

    def most(home: str, new_half: tuple[str, int], others: dict[str, int]) -> int:
        """With all halves there; or while the last half's state is made, as `new_half` with what comes for it."""
        name, coming = new_half
        begins = (halves - 1) * state_bytes + made[home][name].outputs + made[home][name].temporaries + coming
        goes_on = halves * state_bytes + max(
            made[home][other].outputs + made[home][other].temporaries + more for other, more in others.items()
        )
        return weights[home] + max(begins, goes_on)

    needed = {
        "context": most("context", ("prefill", waiting), {"read": 0}),
        "denoiser": most("denoiser", ("receive", first), {"write": later, "absorb": later}),
    }
    per_row = {
        "caches": _total(news) // rows,
        "mamba": (_total(came) - _total(news)) // rows,
        "tokens": _total(written) // rows,
    }
    return Plan(made, weights, dict.fromkeys(weights, halves * state_bytes), needed, per_row)


def _total(shapes: Any) -> int:
    """Bytes of all of shapes, once."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

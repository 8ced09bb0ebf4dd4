"""What a model needs on devices that need not be there: every program of the engine, compiled for them.

The engine's own classes start the programs, on arrays that are shapes alone. Bytes of a program are those of the
compiler's analysis; parameters, rows and what is on its way between towers are counted as the engine holds them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from twotower_jax import compiled_text, two_tower
from twotower_jax.analyses import analysis
from twotower_jax.config import Config
from twotower_jax.engine.devices import Apart, Together
from twotower_jax.engine.rows import Kinds
from twotower_jax.engine.scheduler import SHARE, rehearse
from twotower_jax.engine.sizes import lanes_of, piece_of
from twotower_jax.parameters import parameter_bytes
from twotower_jax.placement import Group, Towers
from twotower_jax.programs import Program
from twotower_jax.shapes import TowersOfShapes
from twotower_jax.state import KVCache, TowerState


@dataclasses.dataclass(frozen=True)
class Wish:
    """An engine.

    Attributes:
      mode: one of `MODES`.
      rows: that are written at a time.
      context: positions of a row.
      block_size: S.
      dtype: of the model.
    """

    mode: str
    rows: int
    context: int
    block_size: int
    dtype: np.dtype


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
      parameters, states: what stays there: the model, and the rows at work and those that wait.
      needed: the most that is there at one time.
      moved: what goes between the towers for a block of one row: by `caches`, `mamba` and `tokens`.
    """

    programs: dict[str, dict[str, Compiled]]
    parameters: dict[str, int]
    states: dict[str, int]
    needed: dict[str, int]
    moved: dict[str, int]


class _Compiler:
    """In the place of `Programs`: compiles, and gives the shapes of results.

    Attributes:
      compiled: by the group's name and the program's.
      outputs: the shapes of what programs give, by name.
    """

    def __init__(self, names: dict[int, str], compilers: str, say: Callable[[str], None]):
        self._names, self._compilers, self._say = names, compilers, say
        self.compiled: dict[str, dict[str, Compiled]] = {home: {} for home in names.values()}
        self.outputs: dict[str, Any] = {}

    def run(self, group: Group, program: Program, *arrays: Any, what: str, **sizes: Any) -> Any:
        """See `Programs.run`."""
        lowered = program.on(group, **sizes).lower(*arrays)
        name, home = program.function.__name__, self._names[id(group)]
        if arrays and name not in self.compiled[home]:  # without any, it makes rows that are empty
            self.compiled[home][name] = self._analysed(lowered, group, home, name)
        self.outputs[name] = group.put(lowered.out_info, program.outputs)
        return self.outputs[name]

    def _analysed(self, lowered: jax.stages.Lowered, group: Group, home: str, name: str) -> Compiled:
        found, c = analysis(lowered, self._compilers), group.config
        self._say(f"{home}: {name}, compiled in {found.seconds:.0f} s{', before' if found.kept else ''}")
        return Compiled(
            arguments=found.arguments,
            outputs=found.outputs,
            temporaries=found.temporaries,
            collectives=compiled_text.collectives(found.text),
            copies=[copy for row in _expert_rows(c) for copy in compiled_text.copies(found.text, row, c.expert_width)],
            seconds=found.seconds,
        )


def _expert_rows(c: Config) -> set[int]:
    """How many elements a row of an expert has: as it is multiplied, and as it is stored where it is quantised."""
    return {c.hidden_size, *c.shape(("expert_row",))} - {0} if c.experts else set()


def _bytes(tree: Any) -> int:
    """What one device holds of shapes."""
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def plan(
    config: Config, towers: Towers, wish: Wish, compilers: str, say: Callable[[str], None] = lambda line: None
) -> Plan:
    """Compiles every program of an engine.

    Args:
      config: the model's dimensions.
      towers: the devices.
      wish: the engine.
      compilers: for the devices: their names and versions, and what they compile for.
      say: is told of each program that is compiled.
    """
    description = two_tower.describe(config, two_towers=towers.denoiser is not None)
    towers = TowersOfShapes.like(towers)
    context = towers.context
    names = {id(context): "context" if towers.split or towers.denoiser is None else "both"}
    if towers.split:
        names[id(towers.denoiser)] = "denoiser"
    compiler = _Compiler(names, compilers, say)
    params = {tower: towers.of(tower).parameters(description[tower], wish.dtype) for tower in description}
    lanes, slots, bench = lanes_of(towers, wish.rows, wish.context)
    sizes = {"slots": slots, "bench": bench, "capacity": wish.context, "block_size": wish.block_size}
    sizes |= {"share": SHARE, "mask_id": 0, "prefix": 0, "what": ""}
    devices = Apart(towers, compiler, params, **sizes) if towers.split else Together(context, compiler, params, **sizes)
    rehearse(devices, bench, [piece_of(bench, wish.context)], [wish.mode], Kinds(rules=("threshold",)))
    made = compiler.compiled
    weights, states, needed = {}, {}, {}
    for group in towers.groups:
        home = names[id(group)]
        weights[home] = sum(
            parameter_bytes(group.config, description[tower], wish.dtype)
            for tower in description
            if towers.of(tower) is group
        )
        states[home] = lanes * sum(map(_bytes, devices.rows_on(group)))
        passing = max(program.outputs + program.temporaries for program in made[home].values())
        needed[home] = weights[home] + states[home] + passing
    moved = {}
    if towers.split:
        telling = ("feed_apart", "read_apart", "verify_apart")
        came = [compiler.outputs[name] for name in telling if name in compiler.outputs]
        needed["denoiser"] += lanes * sum(_bytes(news[1:]) for news in came)
        needed["context"] += lanes * sum(_bytes(news[1:]) for news in came)
        if "read_apart" in compiler.outputs:
            moved = _moved(*compiler.outputs["read_apart"], wish.block_size)
    return Plan(made, weights, states, needed, moved)


def _moved(slots: Any, rows: Any, news: TowerState, block_size: int) -> dict[str, int]:
    """Bytes between towers for a block of one row: what the context tower hears, and what the denoiser does."""

    def each(tree: Any) -> int:
        return sum(int(np.prod(x.shape[1:])) * x.dtype.itemsize for x in jax.tree.leaves(tree))

    own = each([layer for layer in news.layers if isinstance(layer, KVCache)])
    told = 4 * (block_size + 2) * slots.begun.shape[0]  # of each row at work its block, how much is read, its ticket
    return {"caches": own, "mamba": each(news.layers) - own, "tokens": told // rows.shape[0]}

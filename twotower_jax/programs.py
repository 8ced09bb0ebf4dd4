"""A program that all devices of a tower run, and the cache of those that are compiled."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from twotower_jax import distributed, memory
from twotower_jax.placement import Group


@dataclasses.dataclass(frozen=True)
class Program:
    """What every device of a group does with its parts of some arrays.

    Attributes:
      function: called with the dimensions of what one device holds, the arrays, and sizes by name.
      inputs: for each array, or tree of them, its `PartitionSpec`s, or a prefix of these.
      outputs: likewise.
      donated: inputs whose memory the outputs may take.
    """

    function: Callable
    inputs: tuple
    outputs: Any
    donated: tuple[int, ...] = ()

    def on(self, group: Group, **sizes: Any) -> Callable:
        """The jitted program."""
        return jax.jit(
            jax.shard_map(
                functools.partial(self.function, group.config, **sizes),
                mesh=group.mesh,
                in_specs=self.inputs,
                out_specs=self.outputs,
                check_vma=False,
            ),
            donate_argnums=self.donated,
        )


def cache_folder() -> Path:
    """Where what is compiled is kept for the user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twotower_jax"


def keep_between_runs() -> None:
    """Has JAX keep what it compiles for a GPU or TPU, minutes' work for a large model, in the user's cache folder.

    Not what it compiles for a CPU, which another machine that shares the folder may be unable to run. Where
    `JAX_COMPILATION_CACHE_DIR` is set it decides alone.
    """
    if jax.default_backend() != "cpu" and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))


class Programs:
    """Compiled programs.

    Attributes:
      compile_seconds: spent so far.
    """

    def __init__(self):
        self._compiled: dict[Any, Callable] = {}
        self.compile_seconds = 0.0

    def run(self, group: Group, program: Program, *arrays: Any, what: str, **sizes: Any) -> Any:
        """Starts a program on a group's devices; it is compiled once for arrays of these shapes and for these sizes.

        Args:
          group: the devices.
          program: what they do.
          *arrays: on the devices.
          what: the work, for the message if there is no room for it.
          **sizes: what else the program is compiled for.

        Raises:
          InputError: its temporaries do not fit.
        """
        leaves, structure = jax.tree.flatten(arrays)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        key = (id(group), program.function, tuple(sizes.items()), structure, shapes)
        if key not in self._compiled:
            start = time.perf_counter()
            compiled = program.on(group, **sizes).lower(*arrays).compile()
            if (analysis := compiled.memory_analysis()) is not None:
                needed = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
                with distributed.checked_together():
                    for device in group.local_devices:
                        memory.require(needed, device, what)
            self._compiled[key] = compiled
            self.compile_seconds += time.perf_counter() - start
        return self._compiled[key](*arrays)

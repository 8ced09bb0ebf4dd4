"""A program that all devices of a tower run, and the cache of those that are compiled."""

import contextlib
import dataclasses
import functools
import os
import platform
import time
import zlib
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
    """Has JAX keep what it compiles, minutes' work for a large model, in the user's cache folder.

    What is compiled for a CPU has a folder for CPUs of its kind: another machine that shares the cache may be unable to
    run it. Where `JAX_COMPILATION_CACHE_DIR` is set it decides alone; where the folder cannot be made nothing is
    kept.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    folder = cache_folder()
    if jax.default_backend() == "cpu":
        folder /= f"cpu-{zlib.crc32(_this_cpu().encode()):08x}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _this_cpu() -> str:
    """What tells CPUs apart that cannot run each other's programs."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return f"{platform.machine()} {platform.processor()}"


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

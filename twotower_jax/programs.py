"""A program that all devices of a tower run, and the cache of those that are compiled, several at a time."""

import contextlib
import dataclasses
import functools
import logging
import os
import platform
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from twotower_jax import distributed, memory
from twotower_jax.placement import Group

logger = logging.getLogger(__name__)

COMPILERS = 8  # threads at most: one needs gigabytes for a large model


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
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "twotower_jax"


def keep_between_runs() -> None:
    """Has JAX keep what it compiles, minutes' work for a large model, in the user's cache folder.

    What is compiled for a CPU has a folder for CPUs of its kind: another machine that shares the cache may be unable to
    run it. Where `JAX_COMPILATION_CACHE_DIR` is set it decides alone; where the folder cannot be made a warning is
    logged and nothing is kept.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    folder = cache_folder()
    if jax.default_backend() == "cpu":
        folder /= f"cpu-{zlib.crc32(_this_cpu().encode()):08x}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("what is compiled cannot be kept in %s: %s", folder, error.strerror)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _this_cpu() -> str:
    """What tells CPUs apart that cannot run each other's programs."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return f"{platform.machine()} {platform.processor()}"


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program.

    Attributes:
      call: takes the arrays.
      seconds: that it took to compile, in its thread.
    """

    call: jax.stages.Compiled
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A program that is compiled, or will be.

    Attributes:
      outputs: their shapes.
      compiled: is waited for.
    """

    outputs: Any
    compiled: Future[Compiled]


class Programs:
    """Compiled programs. They are traced by who asks for them, and compiled beside one another, in threads.

    Attributes:
      threads: that compile.
      compile_seconds: that were spent in tracing, and in waiting for compilers.
    """

    def __init__(self):
        self.threads = min(COMPILERS, cores())
        self._compilers = ThreadPoolExecutor(self.threads)
        self._begun: dict[Any, _Begun] = {}
        self._running: dict[Any, Callable] = {}
        self.compile_seconds = 0.0

    def ahead(self, group: Group, program: Program, *shapes: Any, **sizes: Any) -> Any:
        """Begins to compile what will be asked for, and does not wait for it.

        Args:
          group: the devices.
          program: what they do.
          *shapes: of the arrays, with shardings.
          **sizes: what else the program is compiled for.

        Returns:
          the shapes of what it gives.
        """
        key = _key(group, program, shapes, sizes)
        if key not in self._begun:
            with self._waiting():
                lowered = program.on(group, **sizes).lower(*shapes)
                self._begun[key] = _Begun(lowered.out_info, self._compilers.submit(_compiled, lowered))
        return self._begun[key].outputs

    def take(self, group: Group, program: Program, *arrays: Any, **sizes: Any) -> Compiled:
        """A program, compiled now unless it was begun before; arguments as for `ahead`."""
        self.ahead(group, program, *arrays, **sizes)
        with self._waiting():
            return self._begun[_key(group, program, arrays, sizes)].compiled.result()

    def finish(self) -> None:
        """Waits until nothing is being compiled."""
        with self._waiting():
            for begun in self._begun.values():
                begun.compiled.result()

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
        key = _key(group, program, arrays, sizes)
        if key not in self._running:
            compiled = self.take(group, program, *arrays, **sizes).call
            if (analysis := compiled.memory_analysis()) is not None:
                needed = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
                with distributed.checked_together():
                    for device in group.local_devices:
                        memory.require(needed, device, what)
            self._running[key] = compiled
        return self._running[key](*arrays)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Counts the seconds; after an error, or Ctrl-C, what has not begun to compile is not compiled."""
        start = time.perf_counter()
        try:
            yield
        except BaseException:
            self._begun = {
                key: begun for key, begun in self._begun.items() if not (begun.compiled.cancel() or _failed(begun))
            }
            raise
        finally:
            self.compile_seconds += time.perf_counter() - start


def _key(group: Group, program: Program, arrays: tuple, sizes: dict[str, Any]) -> Any:
    leaves, structure = jax.tree.flatten(arrays)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return group.mesh, group.config, program.function, tuple(sizes.items()), structure, shapes


def _compiled(lowered: jax.stages.Lowered) -> Compiled:
    start = time.perf_counter()
    call = lowered.compile()
    return Compiled(call, time.perf_counter() - start)


def _failed(begun: _Begun) -> bool:
    return begun.compiled.done() and begun.compiled.exception() is not None

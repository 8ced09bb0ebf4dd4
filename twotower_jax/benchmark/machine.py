"""What a device is, and what it reads, copies and multiplies in a second."""

import dataclasses
import datetime
import platform
import resource
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp

from twotower_jax.benchmark.clock import seconds
from twotower_jax.layers.linear import einsum
from twotower_jax.programs import cores

COLUMNS = 4096
CPU_ARRAY, OTHER_ARRAY = 2**29, 2**32  # bytes: far more than any cache holds
CPU_MATRIX, OTHER_MATRIX = 2048, 8192


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the device did, a second.

    Attributes:
      read: bytes, by the fastest of several ways of reading an array to its end and keeping little of it.
      copied: bytes read and written, by adding 1 to an array in its place.
      operations: of a product of two square matrices in the run's dtype, two for each multiplication with its sum.
    """

    read: float
    copied: float
    operations: float

    @property
    def bytes(self) -> float:
        """The faster of both: what the device can move."""
        return max(self.read, self.copied)


# XLA for CPUs divides a sum among its cores by the rows of what comes out. A copy to new memory is left out: on a CPU
# its first writes wait for the operating system to find that memory.
READS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sum of rows": lambda x: x.sum(1),
    "sum of columns": lambda x: x.sum(0),
    "largest of rows": lambda x: x.max(1),
    "matrix by vector": lambda x: einsum("ij,j->i", x, jnp.ones(x.shape[1], x.dtype)),
}


def rates(dtype: jnp.dtype, array: int | None = None, matrix: int | None = None) -> Rates:
    """Measures the first device; in each the least time of several counts.

    Args:
      dtype: of the matrices.
      array: bytes of what is read.
      matrix: rows of what is multiplied.
    """
    cpu = jax.default_backend() == "cpu"
    array = array or (CPU_ARRAY if cpu else OTHER_ARRAY)
    matrix = matrix or (CPU_MATRIX if cpu else OTHER_MATRIX)
    held = jnp.ones((array // (4 * COLUMNS), COLUMNS), jnp.float32)
    read = min(_least(jax.jit(way), held) for way in READS.values())
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def again() -> jax.Array:
        nonlocal held
        held = add(held)
        return held

    copied = seconds(again).least
    size = held.nbytes
    held.delete()
    square = jax.random.normal(jax.random.key(0), (matrix, matrix), dtype)  # a GPU draws less power for ones
    multiplied = _least(jax.jit(lambda x: einsum("ij,jk->ik", x, x)), square)
    return Rates(size / read, 2 * size / copied, 2 * matrix**3 / multiplied)


def _least(function: Callable, *arrays: jax.Array) -> float:
    return seconds(lambda: function(*arrays)).least


def about() -> dict[str, Any]:
    """The device, the versions and the date."""
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
        "platform": device.platform,
        "device": device.device_kind,
        "cores": cores(),
    }


def peak_memory(before: dict[str, Any] | None = None) -> dict[str, Any]:
    """The most that was used so far: of the device's memory, or of the process's where the device does not say.

    Args:
      before: what it was before the work that is meant; the device tells the most ever alone, so that "exact" says
        whether the work took more.
    """
    statistics = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        peak, of = statistics["peak_bytes_in_use"], "device"
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak, of = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "process"
    return {"peak_bytes": peak, "of": of, "exact": before is None or peak > before["peak_bytes"]}

"""Devices that are not there, to compile for: TPU slices by libtpu, Hopper GPUs by JAX's CUDA plugin."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
from jax.experimental import topologies

from twotower_jax.errors import InputError

GIB = 2**30
TPU_MEMORY = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB}
TPU_SHAPES = {"v4": (3, 16), "v5e": (2, 16), "v5p": (3, 28), "v6e": (2, 16)}  # axes, and chips along each, at most
GPUS = {
    "h100": {"name": "NVIDIA H100 80GB HBM3", "bandwidth": 3_350_000_000_000, "memory": 85_000_000_000},
    "h200": {"name": "NVIDIA H200", "bandwidth": 4_800_000_000_000, "memory": 149_000_000_000},
}
HOPPER = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability {{ major: 9 minor: 0 }} }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """What is compiled for.

    Attributes:
      devices: descriptions of the devices, which can compile and nothing else.
      memory: bytes of each.
      compilers: what compiles for them: packages with their versions, and the description of the target.
      note: empty, or why these are not the devices that were asked for.
    """

    devices: Sequence[Any]
    memory: int
    compilers: str
    note: str = ""


def target(text: str) -> Target:
    """The devices that `h100x2`, `h200x1` or a TPU slice such as `v5e:4x4` names.

    Where the package that knows them is not installed, as many CPU devices stand in: parameters and states are of the
    same bytes then, temporaries and collectives are a CPU's. Call it before JAX has looked for devices.

    Raises:
      InputError: there are no such devices.
    """
    gpu = re.fullmatch(r"(\w+)x([1-9]\d{0,3})", text)
    tpu = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*){1,2})", text)
    if gpu and gpu[1] in GPUS:
        return _gpus(gpu[1], int(gpu[2]))
    if tpu and tpu[1] in TPU_MEMORY:
        return _tpus(text, tpu[1], tpu[2])
    kinds = [f"{kind}xN" for kind in GPUS] + [f"{kind}:NxN" for kind in TPU_MEMORY]
    raise InputError(f"--devices {text}: known are {', '.join(kinds)}, N from 1, such as h100x2 or v5e:4x4")


def missing(text: str) -> str:
    """Why CPU devices would stand in for those that `text` names; empty if their compiler is installed."""
    if ":" in text:
        return "" if importlib.util.find_spec("libtpu") else 'libtpu is not installed (pip install ".[tpu]")'
    if any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))):
        return ""
    return 'JAX\'s CUDA plugin is not installed (pip install ".[cuda]")'


def _gpus(kind: str, count: int) -> Target:
    if why := missing(f"{kind}x{count}"):
        return _stand_ins(count, GPUS[kind]["memory"], why)
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # it would look for a driver
    config = HOPPER.format(**GPUS[kind])
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name=kind, topology=f"1x1x{count}", target_config=config
    )
    return Target(topology.devices, GPUS[kind]["memory"], f"{_versions()} {config}")


def _tpus(text: str, kind: str, shape: str) -> Target:
    sizes = [int(size) for size in shape.split("x")]
    count = math.prod(sizes)
    axes, most = TPU_SHAPES[kind]
    if len(sizes) > axes or max(sizes) > most:  # libtpu would end the process
        raise InputError(
            f"--devices {text}: {kind} has {axes} axes of up to {most} chips, as in {kind}:{'x'.join('4' * axes)}"
        )
    if why := missing(text):
        return _stand_ins(count, TPU_MEMORY[kind], why)
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",  # there is no cloud machine to ask
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nor a chip that another process might have
    }.items():
        os.environ.setdefault(name, value)
    try:
        of_a_host = (min(2, sizes[0]), min(2, sizes[1]), 1)
        topology = topologies.get_topology_desc(platform="tpu", topology_name=text, chips_per_host_bounds=of_a_host)
    except Exception as error:  # libtpu's, of no class of its own
        first = str(error).strip().partition("\n")[0]
        raise InputError(f"--devices {text}: libtpu knows no such slice: {first}") from None
    each = TPU_MEMORY[kind] * count // len(topology.devices)  # a chip may be two devices
    return Target(topology.devices, each, f"{_versions()} {text}")


def _stand_ins(count: int, memory: int, why: str) -> Target:
    with contextlib.suppress(RuntimeError):  # if there are devices already
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(f"{why}, and only {len(devices)} of {count} CPU devices are there to stand in")
    note = f"{why}: compiled for CPU devices instead, of which temporaries and collectives are not the target's"
    return Target(devices[:count], memory, f"{_versions()} cpu {platform.machine()}", note)


def _versions() -> str:
    """Of every package that compiles."""
    names = sorted(p.name for p in metadata.distributions() if re.match("jax|libtpu|nvidia", p.name))
    return " ".join(f"{name}=={metadata.version(name)}" for name in names)

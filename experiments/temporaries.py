"""What the compiler makes of the released model's programs on one GPU: bytes of arguments and of temporaries.

Compiles ahead of time, on a machine without a GPU, and runs nothing:

    pip install ".[cuda]"
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 python experiments/temporaries.py tests/data/released/config.json --out FILE.json

A temporary as large as an expert matrix (1.3 GB) or a key/value cache says that one is copied.
"""

import argparse
import dataclasses
import functools
import json
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from twotower_jax import two_tower
from twotower_jax.config import parse_config, read_json
from twotower_jax.decoding import diffusion
from twotower_jax.decoding.sampling import Sampler
from twotower_jax.decoding.unmasking import ThresholdUnmasking
from twotower_jax.state import empty_state

CAPACITY, BLOCK = 4096, 16
H200 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 149000000000 shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability { major: 9 minor: 0 } }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } device_description_str: "NVIDIA H200"
"""


def programs(config, spec):
    """Name -> (function, arguments, donated argument)."""
    params = jax.tree.map(
        lambda p: spec(config.shape(p.axes), jnp.float32 if p.float32 else jnp.bfloat16),
        two_tower.describe(config, two_towers=True),
    )

    def state(rows):
        shapes = jax.eval_shape(lambda: empty_state(config, rows, CAPACITY, jnp.dtype(jnp.bfloat16)))
        return jax.tree.map(lambda x: spec(x.shape, x.dtype), shapes)

    def tokens(*shape):
        return spec(shape, jnp.int32)

    def extend(rows, length):
        return (
            functools.partial(two_tower.extend, config),
            (params, state(rows), tokens(rows, length), tokens(rows)),
            1,
        )

    def denoise(rows):
        share = spec((rows,), jnp.float32)
        return functools.partial(two_tower.denoise, config), (params, state(rows), tokens(rows, BLOCK), share), None

    def prefill(rows, length):
        function = functools.partial(two_tower.prefill, config, capacity=CAPACITY)
        return function, (params, tokens(rows, length), tokens(rows)), None

    def generate(rows, length):
        number = spec((), jnp.float32)
        rules = diffusion.Diffusion(
            Sampler(number, greedy=True), ThresholdUnmasking(number, tokens()), tokens(), block_size=BLOCK
        )
        function = functools.partial(diffusion.generate, config, capacity=CAPACITY, max_blocks=8)
        seed = spec((), jnp.uint32)
        arrays = (tokens(rows, length), tokens(rows), tokens(rows), seed, tokens(1), tokens())
        return function, (params, rules, *arrays), None

    return {
        "AR step, 1 row": lambda: extend(1, 1),
        "AR step, 16 rows": lambda: extend(16, 1),
        "denoise, 1 row": lambda: denoise(1),
        "denoise, 16 rows": lambda: denoise(16),
        "commit, 16 rows": lambda: extend(16, BLOCK),
        "prefill, 16 rows of 512": lambda: prefill(16, 512),
        "generate by diffusion, 16 rows of 512": lambda: generate(16, 512),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a config.json")
    parser.add_argument("--layers", type=int, help="the first so many layers alone, to compile faster")
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    args = parser.parse_args()
    config = parse_config(read_json(args.config))
    config = dataclasses.replace(config, pattern=config.pattern[: args.layers])
    topology = topologies.get_topology_desc(platform="cuda", topology_name="h200", topology="1x1x1", target_config=H200)
    sharding = NamedSharding(Mesh(np.array(topology.devices), ("x",)), PartitionSpec())
    rows = []
    print(f"{'program':40} {'arguments':>12} {'temporaries':>12} {'compiled in':>12}")
    for name, make in programs(config, functools.partial(jax.ShapeDtypeStruct, sharding=sharding)).items():
        function, arguments, donated = make()
        start = time.perf_counter()
        compiled = jax.jit(function, donate_argnums=() if donated is None else donated).lower(*arguments).compile()
        memory, seconds = compiled.memory_analysis(), time.perf_counter() - start
        print(
            f"{name:40} {memory.argument_size_in_bytes / 1e9:9.2f} GB "
            f"{memory.temp_size_in_bytes / 1e6:9.0f} MB {seconds:10.0f} s",
            flush=True,
        )
        rows.append(
            {"program": name, "arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes}
        )
    if args.out:
        about = {"date": str(date.today()), "jax": version("jax"), "target": "NVIDIA H200, ahead of time"}
        about |= {"pattern": config.pattern, "capacity": CAPACITY, "bytes": rows}
        args.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()

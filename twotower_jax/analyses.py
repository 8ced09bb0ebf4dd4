"""What a compiler says of a program for devices that are not there, kept between runs: JAX's own cache holds programs,
which only a device can read back.
"""

import dataclasses
import gzip
import hashlib
import json
import os
import tempfile
import time
import zlib
from pathlib import Path

import jax

from twotower_jax.programs import cache_folder


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A compiled program; all sizes in bytes.

    Attributes:
      arguments, outputs, temporaries: as the compiler counts them; outputs without those in an argument's place.
      text: the program.
      seconds: that it took to compile.
      kept: whether it is of an earlier run.
    """

    arguments: int
    outputs: int
    temporaries: int
    text: str
    seconds: float
    kept: bool = False


def analysis(lowered: jax.stages.Lowered, compilers: str) -> Analysis:
    """Compiles, or reads what was compiled before for the same program, settings and compilers.

    Args:
      lowered: the program.
      compilers: the target, and the versions of all that compiles for it.
    """
    settings = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    key = hashlib.sha256("\0".join([compilers, *settings, lowered.as_text()]).encode()).hexdigest()
    file = cache_folder() / "plans" / f"{key}.json.gz"
    try:
        return dataclasses.replace(Analysis(**json.loads(gzip.decompress(file.read_bytes()))), kept=True)
    except (OSError, EOFError, zlib.error, ValueError, TypeError):  # none, or a damaged one
        pass
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    made = Analysis(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        text=compiled.as_text(),
        seconds=seconds,
    )
    _keep(made, file)
    return made


def _keep(made: Analysis, file: Path) -> None:
    """A folder that cannot be written to only costs the next run its time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as unfinished:
            unfinished.write(gzip.compress(json.dumps(dataclasses.asdict(made)).encode()))
        os.replace(unfinished.name, file)
    except OSError:
        pass

"""Parts of parameters, straight from the files."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from conftest import DATA
from safetensors.numpy import save_file

import twotower_jax as tt
from convert import convert, layouts
from convert.huggingface import HuggingFaceFolder
from twotower_jax import checkpoint, sharding, two_tower
from twotower_jax.checkpoint import ConvertedFolder
from twotower_jax.config import Shards, parse_config
from twotower_jax.parameters import cut, flatten


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """One checkpoint in both formats; its arrays are large enough to be read in pieces."""
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 1000)
    ours = convert(DATA / "grouped-0", tmp_path / "ours").target
    return {"theirs": HuggingFaceFolder(DATA / "grouped-0"), "ours": ConvertedFolder(ours)}


@pytest.mark.parametrize("kind", ["theirs", "ours"])
@pytest.mark.parametrize("place", [{"expert": 0, "tensor": 1}, {"expert": 3, "tensor": 0}])
def test_a_part_is_what_the_whole_has_there(folders, kind, place):
    folder = folders[kind]
    for path, p in flatten(two_tower.describe(folder.config, True)):
        part = sharding.part(p, folder.config, Shards(expert=4, tensor=2), place)
        np.testing.assert_array_equal(folder.read(path, part), cut(folders["theirs"].read(path), part))


def test_a_damaged_expert_never_loads(folders):
    """A checksum that is not that of an expert refuses the part that has it, and no other."""
    contents = json.loads((folders["ours"].folder / "checkpoint.json").read_text())
    path = ("denoiser", "tower", "layers_2", "mixer", "up")
    contents["checksums"]["/".join(path)][5] += 1
    (folders["ours"].folder / "checkpoint.json").write_text(json.dumps(contents))
    folder = ConvertedFolder(folders["ours"].folder)
    p = dict(flatten(two_tower.describe(folder.config, True)))[path]
    parts = [sharding.part(p, folder.config, Shards(expert=4), {"expert": i}) for i in range(4)]
    assert folder.read(path, parts[0]).shape[0] == 4
    with pytest.raises(tt.InputError, match=r"mixer/up of .* is damaged: its checksum differs"):
        folder.read(path, parts[1])


def test_no_more_is_read_than_the_part_has(folders, monkeypatch):
    """Half of the vocabulary, of the heads or of the experts: about half of the bytes. Parts of the same experts that
    one process reads in a row cost one reading of these.
    """
    read, opened = [], checkpoint.tensorstore.open

    class Counted:
        def __init__(self, array):
            self._array = array

        def result(self):
            return self

        def __getitem__(self, index):
            taken = self._array[index]
            read.append(taken.size)
            return taken

    monkeypatch.setattr(checkpoint.tensorstore, "open", lambda *a, **k: Counted(opened(*a, **k).result()))
    folder = folders["ours"]
    for path, p in flatten(two_tower.describe(folder.config, True)):
        if path[-1] in ("embeddings", "head", "up", "down", "query"):
            size = int(np.prod(folder.config.shape(p.axes)))
            read.clear()
            for place in ({"expert": e, "tensor": t} for e in range(2) for t in range(2)):
                before = sum(read)
                part = sharding.part(p, folder.config, Shards(expert=2, tensor=2), place)
                assert folder.read(path, part).size <= size / 2
                assert sum(read) - before <= 1.2 * size / 2
            # A stack's halves once each; of others both halves for either expert's place.
            assert sum(read) <= 1.2 * size * (1 if p.stacked else 2), path


LOAD = """
import json, os, psutil, resource, sys
from twotower_jax import distributed
from twotower_jax.placement import Placement
import jax, numpy, tqdm, twotower_jax as tt, twotower_jax.model
folder, port, number, most = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
distributed.join(f"localhost:{port}", 2, number)
jax.devices(), numpy.asarray(jax.numpy.ones(3) + 1)
used = lambda: psutil.Process().memory_full_info().uss
base = used()
data = resource.getrlimit(resource.RLIMIT_DATA)
with open("/proc/self/status") as status:
    (held,) = [int(line.split()[1]) * 1024 for line in status if line.startswith("VmData")]
resource.setrlimit(resource.RLIMIT_DATA, (held + most, data[1]))
model = tt.load(folder, placement=Placement([0], [1]))
print(json.dumps({"grown": used() - base, "towers": str(model.towers)}))
"""
LITTLE_STACKS = ["sh", "-c", 'ulimit -s 1024; exec "$@"', "sh"]  # what threads reserve and do not use counts too
MILLION = 10**6


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 1 GB, of which one parameter, a layer's stacked experts, has 84 MB."""
    folder = tmp_path_factory.mktemp("large")
    raw = json.loads((DATA / "tiny-0" / "config.json").read_text())
    raw |= {"hybrid_override_pattern": "E*EEM", "num_hidden_layers": 5, "n_routed_experts": 32}
    raw |= {"hidden_size": 640, "moe_intermediate_size": 2048}
    (folder / "config.json").write_text(json.dumps(raw))
    config = parse_config(raw)
    index = {}
    for i, (_, p) in enumerate(flatten(two_tower.describe(config, True))):
        tensors = layouts.tensors(p, config.shape(p.axes))
        file = f"{i}.safetensors"
        save_file({name: np.zeros(shape, ml_dtypes.bfloat16) for name, shape in tensors.items()}, folder / file)
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.parametrize("kind", ["theirs", "ours"])
def test_a_checkpoint_larger_than_memory(large, kind, tmp_path, free_port):
    """Two processes, a tower each, load what neither could hold: beyond a process's own part there is room for two
    parameters."""
    folder = large if kind == "theirs" else convert(large, tmp_path / "ours").target
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    most = size // 2 + 200 * MILLION
    assert most < 0.8 * size
    jobs = [
        subprocess.Popen(
            [*LITTLE_STACKS, sys.executable, "-c", LOAD, str(folder), str(free_port), *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "MALLOC_ARENA_MAX": "2"},
        )
        for more in ([str(i), str(most)] for i in range(2))
    ]
    try:
        ended = [job.communicate(timeout=100) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    for job, (out, err) in zip(jobs, ended, strict=True):
        assert job.returncode == 0, err[-2000:]
        grown = json.loads(out.splitlines()[-1])["grown"]
        assert size // 2 * 0.9 < grown < most

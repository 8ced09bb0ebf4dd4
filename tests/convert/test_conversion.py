"""HF -> ours -> HF is exact, a result is whole or absent, and memory stays near the largest parameter's."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import DATA, golden_of
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import twotower_jax as tt
from convert import convert, writer
from convert.huggingface import HuggingFaceFolder
from twotower_jax import checkpoint, sources
from twotower_jax.parameters import flatten

GOLDEN = ["tiny-0", "grouped-0", "backbone-0"]


def tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors folder."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        assert tensor.tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("name", GOLDEN)
def test_round_trip_is_exact(name, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 300_000)  # several shards
    monkeypatch.setattr(checkpoint, "GROUP_BYTES", 100_000)
    made = convert(DATA / name, tmp_path / "ours")
    assert made.parameters == sum(tensor.size for tensor in tensors(DATA / name).values())
    convert(tmp_path / "ours", tmp_path / "hf", hf=True)
    assert_same(tensors(DATA / name), tensors(tmp_path / "hf"))
    assert json.loads((tmp_path / "hf/config.json").read_text()) == json.loads(
        (DATA / name / "config.json").read_text()
    )
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    assert files == sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    modes = {path.stat().st_mode for path in (tmp_path / "hf").iterdir()}
    assert len(modes) == 1  # whoever may read the config may read the weights
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(tmp_path / "hf").values())
    with safe_open(tmp_path / "hf" / files[0], "np") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_round_trip_of_mixed_dtypes(tmp_path):
    """Experts of one layer in different dtypes, and float32 where bfloat16 is usual, come back as they were."""
    source = shutil.copytree(DATA / "tiny-0", tmp_path / "hf", copy_function=shutil.copyfile)
    everything = tensors(source)
    for file in source.glob("*.safetensors*"):
        file.unlink()
    name = "context_tower.layers.1.mixer.experts.{}.up_proj.weight"
    everything[name.format(1)] = everything[name.format(1)].astype(np.float32) + np.float32(1e-6)
    everything[name.format(2)] = everything[name.format(2)].astype(np.float16)
    everything["lm_head.weight"] = everything["lm_head.weight"].astype(np.float32)
    everything["scale_shift_tables.3"] = everything["scale_shift_tables.3"].astype(np.float32)
    everything["denoiser_tower.layers.0.mixer.A_log"] = everything["denoiser_tower.layers.0.mixer.A_log"].astype(
        ml_dtypes.bfloat16
    )
    save_file(everything, source / "model.safetensors")  # a single file
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", hf=True)
    assert_same(everything, tensors(tmp_path / "back"))


def test_nan_that_a_mixed_stack_cannot_keep(tmp_path):
    """A stack of several dtypes is held as float32, in which not every NaN of the others has a place."""
    source = shutil.copytree(DATA / "tiny-0", tmp_path / "hf", copy_function=shutil.copyfile)
    everything = tensors(source)
    for file in source.glob("*.safetensors*"):
        file.unlink()
    other, name = (f"context_tower.layers.1.mixer.experts.{i}.up_proj.weight" for i in (0, 1))
    everything[other] = everything[other].astype(np.float16)
    everything[name] = np.full(everything[name].shape, 0x7F81, np.uint16).view(ml_dtypes.bfloat16)
    save_file(everything, source / "model.safetensors")
    with pytest.raises(tt.InputError, match=f"{name} holds a NaN that float32"):
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_folder_named_params_is_no_checkpoint(tmp_path):
    source = shutil.copytree(DATA / "tiny-0", tmp_path / "hf", copy_function=shutil.copyfile)
    (source / "params").mkdir()
    convert(source, source / "params" / "ours")
    convert(source, tmp_path / "ours")
    assert_same(tensors(DATA / "tiny-0"), tensors(source))


def test_converted_loads_the_same_parameters(tiny, tmp_path):
    convert(DATA / "tiny-0", tmp_path / "ours")
    for dtype in ("float32", "bfloat16"):
        ours, theirs = tt.load(tmp_path / "ours", dtype), tt.load(DATA / "tiny-0", dtype)
        assert ours.config == theirs.config
        for (path, one), (_, other) in zip(flatten(ours.params), flatten(theirs.params), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other, err_msg="/".join(path))


def test_tokenizer_goes_along(tmp_path):
    convert("demo", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "hf", hf=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        original = (sources.SHIPPED / "demo" / name).read_bytes()
        assert (tmp_path / "ours" / name).read_bytes() == original
        assert (tmp_path / "hf" / name).read_bytes() == original


@pytest.mark.parametrize("hf", [False, True])
def test_backbone_into_two_towers(tmp_path, hf):
    """Both towers are the backbone's tensors; the conditioning is the identity; NVIDIA's names and config."""
    convert(DATA / "backbone-0", tmp_path / "two", two_towers=True, hf=hf)
    if not hf:
        convert(tmp_path / "two", tmp_path / "hf", hf=True)
    folder = tmp_path / ("two" if hf else "hf")
    backbone, both = tensors(DATA / "backbone-0"), tensors(folder)
    for name, tensor in backbone.items():
        if name == "lm_head.weight":
            copies = [both.pop("lm_head.weight"), both.pop("context_lm_head.weight")]
        else:
            copies = [both.pop(name.replace("backbone.", tower)) for tower in ("context_tower.", "denoiser_tower.")]
        for copy in copies:
            assert copy.dtype == tensor.dtype
            assert copy.tobytes() == tensor.tobytes()
    assert {name.split(".")[0] for name in both} == {"t_embedder", "t_block", "scale_shift_tables"}
    assert all((both[f"scale_shift_tables.{i}"] == [[0.0], [0.0], [1.0]]).all() for i in range(20))
    assert not both["t_block.1.weight"].any()
    assert both["t_embedder.mlp.0.weight"].astype(np.float32).std() > 0.01
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["NemotronHTwoTowerForCausalLM"]


def test_newer_config_becomes_nvidias(tmp_path):
    """Two towers of a backbone that lists its layers: NVIDIA's code reads the pattern."""
    source = shutil.copytree(DATA / "backbone-0", tmp_path / "hf", copy_function=shutil.copyfile)
    config = json.loads((source / "config.json").read_text())
    names = {"M": "linear_attention", "*": "full_attention", "E": "moe"}
    pattern = config.pop("hybrid_override_pattern")
    config.pop("num_hidden_layers")
    config |= {"layers_block_type": [names[letter] for letter in pattern]}
    config["time_step_limit"] = [0.0, {"__float__": "Infinity"}]
    (source / "config.json").write_text(json.dumps(config))
    golden = golden_of("backbone-0")
    logits = tt.load(source, "float32").context_logits(golden.prompt(1))
    np.testing.assert_array_equal(logits, golden.model.context_logits(golden.prompt(1)))
    convert(source, tmp_path / "two", two_towers=True)
    made = json.loads((tmp_path / "two" / "config.json").read_text())
    assert made["hybrid_override_pattern"] == pattern
    assert made["num_hidden_layers"] == 20
    assert "layers_block_type" not in made
    assert made["time_step_limit"] == [0.0, float("inf")]


def test_two_towers_of_two_towers(tmp_path):
    with pytest.raises(tt.InputError, match="holds two towers already"):
        convert(DATA / "tiny-0", tmp_path / "x", two_towers=True)
    assert not list(tmp_path.iterdir())


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, path):
        raise OSError("disk on fire")

    monkeypatch.setattr(HuggingFaceFolder, "read", fail)
    with pytest.raises(OSError, match="disk on fire"):
        convert(DATA / "tiny-0", tmp_path / "ours")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [[], ["--to-hf"]])
def test_full_disk(tmp_path, option):
    """A line, and nothing left behind; a limit on the size of files stands for the disk."""
    limited = "import resource, signal, sys; from twotower_jax.cli import main\n"
    limited += (
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))\n"
    )
    limited += "sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", limited, "convert", str(DATA / "tiny-0"), str(tmp_path / "ours"), *option]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "twotower: cannot write " in ended.stderr
    assert not list(tmp_path.iterdir())


SLOWED = """
    import signal, sys, time
    from convert.huggingface import HuggingFaceFolder
    from twotower_jax.cli import main
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as at a terminal, wherever the tests run
    read = HuggingFaceFolder.read
    def slow(self, path):
        print("reading", flush=True)
        time.sleep(0.05)
        return read(self, path)
    HuggingFaceFolder.read = slow
    sys.exit(main(["convert", sys.argv[1], sys.argv[2]]))
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_nothing_that_loads(tmp_path, ending):
    target = tmp_path / "ours"
    command = [sys.executable, "-c", textwrap.dedent(SLOWED), str(DATA / "tiny-0"), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(30):
        process.stdout.readline()
    process.send_signal(ending)
    _, errors = process.communicate(timeout=60)
    assert not target.exists()
    if ending != signal.SIGKILL:
        assert process.returncode == 130
        assert errors.splitlines()[-1] == "twotower: interrupted"
        assert not list(tmp_path.iterdir())
    for left in tmp_path.iterdir():
        with pytest.raises(tt.InputError):
            tt.load(left)
    convert(DATA / "tiny-0", target)  # and a later run is not troubled by what was left
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


MEASURED = """
    import sys, threading, time
    import psutil
    from convert import convert, writer
    from twotower_jax import checkpoint

    largest = int(sys.argv[5])
    checkpoint.GROUP_BYTES = writer.SHARD_BYTES = largest  # smaller, as the checkpoint is
    checkpoint.CHUNK_BYTES = largest // 16

    def private(process=psutil.Process()):
        memory = process.memory_info()
        return memory.rss - memory.shared  # without files that are mapped

    convert(sys.argv[1], sys.argv[2] + "-first", hf=sys.argv[4] == "hf")  # what is loaded lazily
    peak, before, done = 0, private(), False
    def watch():
        global peak
        while not done:
            peak = max(peak, private())
            time.sleep(0.002)
    thread = threading.Thread(target=watch)
    thread.start()
    convert(sys.argv[3], sys.argv[2], hf=sys.argv[4] == "hf")
    done = True
    thread.join()
    print(peak - before)
"""


def test_memory_stays_near_the_largest_parameter(tmp_path):
    """Half a gigabyte in 16 stacks of experts, there and back; measured: 3 to 4 times one stack."""
    raw = json.loads((DATA / "tiny-0" / "config.json").read_text())
    raw |= {"hidden_size": 256, "n_routed_experts": 64, "moe_intermediate_size": 1024, "vocab_size": 64}
    raw |= {"hybrid_override_pattern": "ME" * 4, "num_hidden_layers": 8}
    write_random(tmp_path / "big", raw)
    largest = 2 * 64 * 256 * 1024
    assert sum(file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors")) > 16 * largest
    for source, target, to in (("big", "ours", "orbax"), ("ours", "back", "hf")):
        command = [sys.executable, "-c", textwrap.dedent(MEASURED), DATA / "tiny-0", tmp_path / target]
        command += [tmp_path / source, to, str(largest)]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed goes back at once
        grown = int(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)
        assert grown < 5 * largest, f"{to}: {grown / largest:.1f} times the largest parameter"


def write_random(folder: Path, raw: dict) -> None:
    """A TwoTower checkpoint of random bits."""
    from convert import layouts
    from twotower_jax import two_tower
    from twotower_jax.config import parse_config

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    config = parse_config(raw)
    rng = np.random.default_rng(0)
    placed = {}
    for i, (_, p) in enumerate(flatten(two_tower.describe(config, True))):
        shapes = layouts.tensors(p, config.shape(p.axes))
        file = f"model-{i:05}.safetensors"
        save_file(
            {n: rng.standard_normal(s, np.float32).astype(ml_dtypes.bfloat16) for n, s in shapes.items()}, folder / file
        )
        placed |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))

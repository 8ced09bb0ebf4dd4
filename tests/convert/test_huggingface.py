"""Every fault of a checkpoint has a line of its own; all are listed; nothing is written."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import DATA
from safetensors.numpy import load_file, save_file

import twotower_jax as tt
from convert import convert

INDEX = "model.safetensors.index.json"
FILES = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A writable copy of tiny-0."""
    return shutil.copytree(DATA / "tiny-0", tmp_path / "source", copy_function=shutil.copyfile)


def lines(folder: Path) -> list[str]:
    """What converting says; it must leave nothing behind."""
    target = folder.parent / "target"
    with pytest.raises(tt.InputError) as error:
        convert(folder, target)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    with pytest.raises(tt.InputError):
        tt.load(folder)
    return str(error.value).splitlines()


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_file(folder: Path, file: str, change) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def test_missing_and_unexpected(folder):
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    gone = ["lm_head.weight", "t_block.1.bias", "context_tower.layers.1.mixer.experts.3.up_proj.weight"]

    def change(weight_map):
        for name in gone:
            del weight_map[name]
        weight_map["extra.weight"] = FILES[0]

    edit_index(folder, change)
    for name in gone:
        edit_file(folder, index[name], lambda tensors, name=name: tensors.pop(name))
    edit_file(folder, FILES[0], lambda tensors: tensors.update({"extra.weight": np.zeros((2, 3), np.float32)}))
    assert sorted(lines(folder)) == sorted(
        [
            "missing tensor lm_head.weight (128, 64)",
            "missing tensor t_block.1.bias (192,)",
            "missing tensor context_tower.layers.1.mixer.experts.3.up_proj.weight (48, 64)",
            f"unexpected tensor extra.weight (2, 3) in {FILES[0]}",
        ]
    )


def test_wrong_shape_and_dtype(folder):
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    shape, dtype = "lm_head.weight", "denoiser_tower.norm_f.weight"
    edit_file(folder, index[shape], lambda t: t.update({shape: np.zeros((64, 128), ml_dtypes.bfloat16)}))
    edit_file(folder, index[dtype], lambda t: t.update({dtype: np.zeros(64, np.int32)}))
    assert sorted(lines(folder)) == sorted(
        [
            f"tensor {shape} in {index[shape]} has shape (64, 128), config.json asks for (128, 64)",
            f"tensor {dtype} in {index[dtype]} is I32; known are BF16, F16, F32",
        ]
    )


@pytest.mark.parametrize("size", [0, 5, 1000, 400_000])
def test_truncated_file(folder, size):
    with open(folder / FILES[1], "r+b") as handle:
        handle.truncate(size)
    (line,) = lines(folder)
    assert line.startswith(f"{FILES[1]} is truncated or no safetensors file: ")


def test_truncated_single_file(folder):
    tensors = {}
    for file in FILES:
        tensors |= load_file(folder / file)
        (folder / file).unlink()
    (folder / INDEX).unlink()
    save_file(tensors, folder / "model.safetensors")
    assert tt.load(folder).two_towers
    with open(folder / "model.safetensors", "r+b") as handle:
        handle.truncate(500_000)
    (line,) = lines(folder)
    assert line.startswith("model.safetensors is truncated")


@pytest.mark.parametrize("outside", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
def test_index_that_leads_outside(folder, outside):
    (folder.parent / "outside.safetensors").write_bytes(b"")
    (folder.parent / "outside.safetensors").unlink()
    edit_index(folder, lambda weight_map: weight_map.update({"lm_head.weight": outside}))
    found = lines(folder)
    assert f"{INDEX} names {outside!r}, which is not a file of its own folder" in found
    holder = json.loads((DATA / "tiny-0" / INDEX).read_text())["weight_map"]["lm_head.weight"]
    assert f"{holder} holds lm_head.weight, which {INDEX} places in {outside}" in found
    assert len(found) == 2


def test_index_that_promises_too_much(folder):
    edit_index(
        folder, lambda weight_map: weight_map.update({"lm_head.weight": FILES[0], "t_block.1.bias": "none.safetensors"})
    )
    found = lines(folder)
    home = json.loads((DATA / "tiny-0" / INDEX).read_text())["weight_map"]
    expected = [f"{INDEX} names none.safetensors, which does not exist"]
    expected.append(f"{home['t_block.1.bias']} holds t_block.1.bias, which {INDEX} places in none.safetensors")
    if home["lm_head.weight"] != FILES[0]:
        expected.append(f"{INDEX} places lm_head.weight in {FILES[0]}, which lacks it")
        expected.append(f"{home['lm_head.weight']} holds lm_head.weight, which {INDEX} places in {FILES[0]}")
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_index_of_another_form(folder, text):
    (folder / INDEX).write_text(text)
    assert lines(folder) == [f'{INDEX} must hold {{"weight_map": {{tensor: file}}}}']


def test_index_that_is_not_json(folder):
    (folder / INDEX).write_text("{")
    (line,) = lines(folder)
    assert f"{INDEX} is not JSON" in line


def test_no_weights(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (line,) = lines(folder)
    assert "holds no weights" in line
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (line,) = lines(folder)
    assert "pickled weights" in line


def test_config_for_other_weights(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 256}))
    found = lines(folder)
    assert len(found) == 4  # two embeddings, two heads
    assert all("config.json asks for (256, 64)" in line for line in found)

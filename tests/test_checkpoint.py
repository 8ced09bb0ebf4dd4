"""A converted folder that is damaged is refused."""

import json
import shutil

import pytest
from conftest import DATA

import twotower_jax as tt
from convert import convert


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    return convert(DATA / "tiny-0", tmp_path_factory.mktemp("converted") / "ours").target


@pytest.fixture
def copy(converted, tmp_path):
    return shutil.copytree(converted, tmp_path / "copy")


def test_other_config(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 256}))
    with pytest.raises(tt.InputError) as error:
        tt.load(copy)
    assert len(str(error.value).splitlines()) == 4
    assert "context/tower/embeddings has shape (128, 64), config.json asks for (256, 64)" in str(error.value)


def test_other_layers(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"hybrid_override_pattern": "MEM*EME-"}))
    with pytest.raises(tt.InputError, match="missing parameter context/tower/layers_7/mixer/up"):
        tt.load(copy)


def test_lost_files(copy):
    shutil.rmtree(copy / "params" / "state")
    with pytest.raises(tt.InputError, match=r"is no checkpoint that convert wrote|cannot read"):
        tt.load(copy)


def test_damaged_data(copy):
    largest = max((path for path in copy.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with open(largest, "r+b") as handle:
        handle.truncate(largest.stat().st_size // 2)
    with pytest.raises(tt.InputError, match="cannot read"):
        tt.load(copy)


def test_empty_parameters(copy):
    shutil.rmtree(copy / "params")
    (copy / "params").mkdir()
    with pytest.raises(tt.InputError, match="is no checkpoint that convert wrote"):
        tt.load(copy)

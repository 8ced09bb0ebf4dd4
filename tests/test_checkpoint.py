"""A converted folder gives what was written; one that is damaged is refused."""

import contextlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import DATA

import twotower_jax as tt
from convert import convert
from convert.huggingface import HuggingFaceFolder
from twotower_jax import checkpoint, two_tower
from twotower_jax.parameters import flatten


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


def files(folder) -> list:
    return [path for path in (folder / "params").rglob("*") if path.is_file()]


def test_lost_files(copy):
    """A line for each, and nothing on the screen beside it."""
    lost = files(copy)
    shutil.rmtree(copy / "params" / "state")
    lost = [path for path in lost if not path.exists()]
    with pytest.raises(tt.InputError) as error:
        tt.load(copy)
    assert sorted(str(error.value).splitlines()) == sorted(f"{path} is missing; convert it again" for path in lost)


def test_cut_files(copy):
    for path in files(copy):
        whole = path.read_bytes()
        if whole:
            path.write_bytes(whole[: len(whole) // 2])
            with pytest.raises(tt.InputError, match=rf"{path.name} is damaged: it has .* bytes, not {len(whole)}"):
                tt.load(copy)
            path.write_bytes(whole)
    tt.load(copy)


def test_what_orbax_cannot_read(copy, capfd):
    """Its many complaints become one line."""
    (metadata,) = copy.rglob("_METADATA")
    metadata.write_bytes(b"x" * metadata.stat().st_size)
    with pytest.raises(tt.InputError, match="params is damaged; convert it again") as error:
        tt.load(copy)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_turned_bits(copy):
    """Of any file: what is loaded is what was written, or nothing is."""
    whole = {"/".join(path): np.asarray(value) for path, value in flatten(tt.load(copy).params)}
    refused = 0
    for file in files(copy):
        data = file.read_bytes()
        for at in {len(data) // 5, len(data) // 2, len(data) * 4 // 5} if data else ():
            file.write_bytes(data[:at] + bytes([data[at] ^ 0x5A]) + data[at + 1 :])
            with contextlib.suppress(tt.InputError):
                for path, value in flatten(tt.load(copy).params):
                    np.testing.assert_array_equal(value, whole["/".join(path)])
                refused -= 1
            refused += 1
            file.write_bytes(data)
    assert refused > 5


def test_nothing_but_the_line_on_the_screen(copy):
    """Orbax's drivers report to a loop that is closed; the user need not know."""
    for file in (copy / "params" / "state" / "d").iterdir():
        file.write_bytes(b"x" * file.stat().st_size)
    command = [sys.executable, "-m", "twotower_jax.cli", "generate", str(copy), "--ids", "5"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "params is damaged; convert it again" in ended.stderr


def test_contents_that_are_wrong(copy):
    whole = json.loads((copy / "checkpoint.json").read_text())
    checksums = dict.fromkeys(whole["checksums"])
    wrong = [("odd_dtypes", {"lm_head.weight": "int8"}), ("files", None), ("checksums", []), ("checksums", checksums)]
    for name, value in wrong:
        (copy / "checkpoint.json").write_text(json.dumps(whole | {name: value}))
        with pytest.raises(tt.InputError, match="must hold two_towers, odd_dtypes, files, checksums, as convert"):
            tt.load(copy)
    (copy / "checkpoint.json").write_text(json.dumps(whole | {"checksums": {}}))
    with pytest.raises(tt.InputError, match="its checksum differs"):
        tt.load(copy)


def test_no_checkpoint(copy):
    contents = copy / "checkpoint.json"
    contents.write_text('{"two_towers": true}')
    with pytest.raises(tt.InputError, match="must hold two_towers, odd_dtypes, files"):
        tt.load(copy)
    contents.unlink()
    with pytest.raises(tt.InputError, match="no checkpoint that convert finished"):
        tt.load(copy)


@pytest.mark.parametrize("group", [0, 50_000, 2**27])
def test_read_in_any_order(converted, monkeypatch, group):
    """Parameters come as they were written, each in its turn, backwards, or twice; in turn they are read in groups."""
    monkeypatch.setattr(checkpoint, "GROUP_BYTES", group)
    calls, load = [], checkpoint.ocp.load
    monkeypatch.setattr(checkpoint.ocp, "load", lambda *arguments: calls.append(1) or load(*arguments))
    folder, source = checkpoint.ConvertedFolder(converted), HuggingFaceFolder(DATA / "tiny-0")
    paths = [path for path, _ in flatten(two_tower.describe(folder.config, True))]
    in_turn = {path: folder.read(path) for path in paths}
    assert len(calls) == {0: len(paths), 2**27: 1}.get(group, len(calls))
    assert len(calls) > 1 or group == 2**27
    for path in (*reversed(paths[-5:]), paths[0], paths[0]):
        np.testing.assert_array_equal(folder.read(path), in_turn[path])
    for path in paths:
        assert in_turn[path].dtype == source.dtype(path)
        np.testing.assert_array_equal(in_turn[path], source.read(path))

"""Where a model is: a folder, a model that ships with the package, or a Hugging Face id."""

import json
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from twotower_jax import checkpoint, two_tower
from twotower_jax.config import BACKBONE_ARCHITECTURE, Config, parse_config, read_json
from twotower_jax.errors import InputError, short

SHIPPED = Path(__file__).parent / "models"
CONFIGS = Path(__file__).parent / "configs"

# What a model folder holds beside its weights and config.json; goes along when it is converted.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


DOWNLOADED = ("config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES)
NAME = r"[\w.-]+/[\w.-]+"  # of a model at Hugging Face


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(folder.name for folder in SHIPPED.iterdir() if (folder / "config.json").is_file())


def configurations() -> list[str]:
    """Names of the configurations without weights that come with the package."""
    return sorted(file.stem for file in CONFIGS.glob("*.json"))


def configuration(name: str | Path) -> Path:
    """The path of a config.json that is named or given; of anything else the path as it is given."""
    path = user_path(name)
    return CONFIGS / f"{name}.json" if str(name) in configurations() and not path.exists() else path


def user_path(name: str | Path) -> Path:
    """A path as a user gives it, with `~`."""
    if not isinstance(name, str | os.PathLike) or not os.fspath(name):
        raise InputError(f"{short(name)} is no path; give a folder's, or a model's name")
    try:
        os.fsdecode(name).encode()
        path = Path(name).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path
    except OSError as error:  # a name that is too long, a loop of links
        raise InputError(f"{short(name)} is no path: {error.strerror}") from None
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{short(name)} is no path: {error}") from None
    return path


def locate(model: str | Path, names: Sequence[str] = ()) -> Path:
    """The folder of a model; one that is named by a Hugging Face id is downloaded (or found in the cache).

    Args:
      model: a folder, a name or an id.
      names: what else the caller knows by name.

    Raises:
      InputError: there is no such folder or model.
    """
    folder = user_path(model)
    if (folder / "config.json").is_file():
        return folder
    if str(model) in shipped():
        return SHIPPED / str(model)
    if folder.is_dir():
        raise InputError(f"{model} is no model folder: it has no config.json")
    if folder.exists():
        raise InputError(f"{model} is a file; give the folder that holds config.json and the weights")
    if str(model) in configurations():
        raise InputError(f"{model} is a configuration without weights, for bench and plan; give a model")
    if not re.fullmatch(NAME, str(model)):
        raise InputError(
            f"{model} does not exist; give a model folder, a Hugging Face id such as nvidia/NAME, "
            f"or what comes with the package: {', '.join([*shipped(), *names])}"
        )
    return _download(str(model))


def config_alone(model: str | Path) -> tuple[Config, bool]:
    """The dimensions of a model, and whether it is a backbone; nothing but `config.json`, a path to it, or the name of
    one that comes with the package, need be.
    """
    path = configuration(model)
    if path.is_file():
        raw = read_json(path)
    elif not path.exists() and str(model) not in shipped() and re.fullmatch(NAME, str(model)):
        raw = read_json(_download(str(model), ["config.json"]) / "config.json")
    else:
        raw = read_json(locate(model, configurations()) / "config.json")
    return parse_config(raw), BACKBONE_ARCHITECTURE in (raw.get("architectures") or [])


def _download(name: str, patterns: Sequence[str] = DOWNLOADED) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise InputError(f"{name} is neither a folder here nor to be had from Hugging Face: {first}") from None


def open_folder(folder: Path):
    """The checked contents of a model folder: a `ConvertedFolder` or a `HuggingFaceFolder`."""
    from convert.huggingface import HuggingFaceFolder  # the converter stands on this package

    return checkpoint.ConvertedFolder(folder) if checkpoint.is_converted(folder) else HuggingFaceFolder(folder)


def fingerprint(folder: Any) -> str:
    """Of an open model folder: of its `identity`, and the sizes of its files."""
    files = sorted((file.name, file.stat().st_size) for file in folder.folder.iterdir() if file.is_file())
    return json.dumps([identity(folder), files])


def identity(folder: Any) -> str:
    """Of the model in an open folder, in any layout: its configuration, and the values of its least parameters."""
    norms = [folder.read((tower, "tower", "norm_f")) for tower in two_tower.describe(folder.config, folder.two_towers)]
    values = [zlib.crc32(np.ascontiguousarray(norm).view(np.uint8)) for norm in norms]
    return json.dumps([folder.raw_config, values], sort_keys=True)

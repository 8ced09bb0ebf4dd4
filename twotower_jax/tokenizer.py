"""Text to token ids and back, by a checkpoint's `tokenizer.json`."""

from pathlib import Path

from tokenizers import Tokenizer

from twotower_jax.errors import InputError


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model folder; None if it has none.

    Raises:
      InputError: there is a `tokenizer.json`, but it cannot be read.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise InputError(f"{file} is no tokenizer: {error}") from None

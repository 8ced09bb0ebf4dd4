"""How a text came to be, drawn: a page to walk through, a film, or a picture."""

import contextlib
import os
import secrets
from pathlib import Path

from twotower_jax.errors import InputError
from twotower_jax.publishing import SUFFIX
from twotower_jax.trace.record import Trace

KINDS = (".html", ".gif", ".png")


def check(path: str | os.PathLike) -> Path:
    """Where `draw` will write: the path without links.

    Raises:
      InputError: nothing can be drawn there.
    """
    path = Path(path)
    if path.suffix.lower() not in KINDS:
        raise InputError(f"{path} must end with {', '.join(KINDS[:-1])} or {KINDS[-1]}: that says what is drawn")
    try:
        target = path.resolve()
        there, is_file, folder = os.path.lexists(target), target.is_file(), target.parent.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a null character
        raise InputError(f"{path} cannot be written: {error}") from None
    if there and not is_file:
        raise InputError(f"{path} is there and is not a file; give another name")
    if not folder:
        raise InputError(f"{path} cannot be written: there is no folder {target.parent}")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written: nothing can be made in {target.parent}")
    return target


def draw(trace: Trace, path: str | os.PathLike) -> None:
    """Draws a trace: `.html` a page with every row, `.gif` a film of the first, `.png` a picture of the first few.

    The file appears when it is whole; one that is there is replaced.

    Raises:
      InputError: see `check`.
      OSError: it could not be written.
    """
    target = check(path)
    made = _drawn(trace, Path(path).suffix.lower())
    unfinished = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}{SUFFIX}")
    try:
        with open(unfinished, "xb") as file:
            file.write(made)
        os.replace(unfinished, target)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _drawn(trace: Trace, kind: str) -> bytes:
    if kind == ".html":
        from twotower_jax.trace.html import page

        return page(trace).encode()
    from twotower_jax.trace import image

    return image.gif(trace) if kind == ".gif" else image.png(trace)

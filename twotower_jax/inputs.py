"""Checks of what a caller gives; each failure is one clear line."""

import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import jax.numpy as jnp
import numpy as np

from twotower_jax.errors import InputError, short

DTYPES = {"float32": jnp.dtype(jnp.float32), "bfloat16": jnp.dtype(jnp.bfloat16)}


def bucket(length: int) -> int:
    """The next of few lengths, at most a quarter longer (or 16), so that few programs are compiled."""
    step = max(16, (1 << (length - 1).bit_length()) // 8) if length > 1 else 16
    return -(-length // step) * step


def dtype(value: Any) -> jnp.dtype:
    """The dtype of a model's weights and activations."""
    name = value if isinstance(value, str) else getattr(value, "__name__", None) or getattr(value, "name", repr(value))
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} does not exist here; choose {' or '.join(DTYPES)}")
    return DTYPES[name]


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """A whole number in [low, high]; numpy's and JAX's scalars will do."""
    try:
        number = None if _is_bool(value) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise InputError(f"{name} must be a whole number, not {short(value)}")
    if number < low or (high is not None and number > high):
        raise InputError(
            f"{name} must be {f'{low} or more' if high is None else f'from {low} to {high}'}, not {short(number)}"
        )
    return number


def number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> float:
    """A finite number in [low, high], or (low, high]; numpy's and JAX's scalars will do."""
    try:
        number = math.nan if _is_bool(value) or isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high or (open_low and number == low):
        least = f"above {low:g}" if open_low else f"{low:g} or more"
        raise InputError(f"{name} must be a number, {least} and at most {high:g}, not {short(value)}")
    return number


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or getattr(value, "dtype", None) == np.bool_


def token_ids(where: str, ids: Any, vocab_size: int) -> np.ndarray:
    """One non-empty sequence of token ids, (L,) int32."""
    if isinstance(ids, str | bytes | Set | Mapping) or not isinstance(ids, Iterable):
        raise InputError(f"{where} must be a list of token ids, not {short(ids)}")
    try:
        ids = ids if hasattr(ids, "__array__") else list(ids)
        array = np.asarray(ids)
        if isinstance(ids, list) and any(map(_is_bool, ids)):
            array = np.asarray(ids, object).astype(bool)
    except (TypeError, ValueError):  # a ragged list, an array of random keys
        raise InputError(f"{where} must be a flat list of whole numbers, not a nested one") from None
    if array.size == 0:
        raise InputError(f"{where} is empty; it needs one token or more")
    huge = array.dtype == object and all(isinstance(i, numbers.Integral) for i in array.ravel())
    if array.ndim != 1 or not (huge or array.dtype.kind in "iu"):
        raise InputError(f"{where} must be a flat list of whole numbers, not an array of {array.dtype} {array.shape}")
    outside = (array < 0) | (array >= vocab_size)
    if outside.any():
        at = int(outside.argmax())
        raise InputError(f"{where} has id {short(array.item(at))} at position {at}; ids go from 0 to {vocab_size - 1}")
    return array.astype(np.int32)


def prompts(value: Any, vocab_size: int) -> list[np.ndarray]:
    """A list of token-id lists of any lengths."""
    if isinstance(value, str | bytes | Set) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        raise InputError(f"prompts must be a list of token-id lists, not {short(value)}")
    value = list(value)
    if value and all(isinstance(item, numbers.Integral) or getattr(item, "ndim", 1) == 0 for item in value):
        raise InputError("prompts must be a list of token-id lists; for one prompt give [ids]")
    return [token_ids(f"prompt {i}", ids, vocab_size) for i, ids in enumerate(value)]


def row_numbers(value: Sequence[int] | None, count: int) -> np.ndarray:
    """The numbers that rows' random keys come from, (B,) int32: 0, 1, 2... unless given."""
    if value is None:
        return np.arange(count, dtype=np.int32)
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise InputError(f"rows must be a list of whole numbers, not {short(value)}")
    rows = [whole("a row's number", row, 0, 2**31 - 1) for row in value]
    if len(rows) != count:
        raise InputError(f"rows must have a number for each of {count} prompts, not {len(rows)}")
    return np.asarray(rows, np.int32)


def stop_ids(value: Any, vocab_size: int) -> np.ndarray:
    """No, one or several ids that end a row, (n,) int32."""
    if value is None:
        return np.zeros(0, np.int32)
    several = isinstance(value, Iterable) and not isinstance(value, str | bytes) and getattr(value, "ndim", 1) == 1
    ids = list(value) if several else [value]
    return np.asarray([whole("eos_token_id", i, 0, vocab_size - 1) for i in ids], np.int32)


def sampling(temperature: Any, top_k: Any = None, top_p: Any = None) -> tuple[float, int | None, float | None]:
    """The numbers of `Sampler.of`."""
    temperature = float(np.float32(number("temperature", temperature, 0, 1e6)))
    top_k = None if top_k is None else whole("top_k", top_k, 1)
    top_p = None if top_p is None else number("top_p", top_p, 0, 1, open_low=True)
    if top_p == 1:  # everything, whatever a float32 sum of probabilities comes to
        top_p = None
    return temperature, top_k, top_p

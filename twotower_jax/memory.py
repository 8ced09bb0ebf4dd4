"""What a device has room for."""

import os

import jax
import psutil

from twotower_jax.errors import InputError


def free_bytes(device: jax.Device) -> int:
    """Bytes that can still be allocated on a device."""
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    return psutil.virtual_memory().available


def require(needed: int, device: jax.Device, what: str) -> None:
    """Raises an `InputError` with the numbers if `needed` bytes are not free."""
    free = free_bytes(device)
    if needed > free:
        hint = _hint(device)
        raise InputError(f"{what} would take {needed / 1e9:.3g} GB; {device} has {free / 1e9:.3g} GB free{hint}")


def _hint(device: jax.Device) -> str:
    if device.platform != "gpu":
        return ""
    share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75, which is JAX's default")
    return f" (of what XLA_PYTHON_CLIENT_MEM_FRACTION lets JAX take of a GPU: {share})"

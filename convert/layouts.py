"""How one Hugging Face tensor lies there and here."""

from collections.abc import Sequence

import numpy as np

from twotower_jax.parameters import Parameter, Part


def to_ours(p: Parameter, tensor: np.ndarray) -> np.ndarray:
    """A tensor as Hugging Face has it -> one slice of our parameter (the whole of it unless stacked)."""
    match p.layout:
        case "linear":
            return tensor.T
        case "conv":
            return tensor[:, 0].T
    return tensor


def to_hf(p: Parameter, slice_: np.ndarray) -> np.ndarray:
    """The inverse of `to_ours`."""
    match p.layout:
        case "linear":
            return slice_.T
        case "conv":
            return slice_.T[:, None]
    return slice_


def part_there(p: Parameter, part: Part) -> Part:
    """A part of one slice of ours as a part of the tensor."""
    match p.layout:
        case "linear":
            return part[::-1]
        case "conv":
            return (part[1], (slice(0, 1),), part[0])
    return part


def tensors(p: Parameter, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the Hugging Face tensors that hold a parameter of ours, in the order of its slices."""
    one = tuple(shape[1:] if p.stacked else shape)
    match p.layout:
        case "linear":
            one = one[::-1]
        case "conv":
            one = (one[1], 1, one[0])
    names = [p.hf.format(i) for i in range(shape[0])] if p.stacked else [p.hf]
    return dict.fromkeys(names, one)

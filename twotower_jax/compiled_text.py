"""What a compiled program's text tells: the collectives in it, and arrays that are copies of weights."""

import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all", "reduce-scatter")
BITS = {"pred": 8, "s4": 4, "u4": 4, "s64": 64, "u64": 64, "c64": 64, "c128": 128}

# Operations whose result is no new array.
IN_PLACE = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "opt-barrier")

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(", re.MULTILINE)
IN_VECTOR_MEMORY = re.compile(r"\w+\[[\d,]*\]\{[^}]*S\(1\)\}")
SHAPE = re.compile(r"\b([a-z]+[0-9a-z]*)\[([\d,]*)\]")


def _shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in SHAPE.findall(text)]


def _bytes(dtype: str, dims: tuple[int, ...]) -> int:
    bits = BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
    return math.prod(dims) * bits // 8


def _instructions(text: str) -> Iterator[tuple[str, str]]:
    """Result types and operations that have memory of their own: not those inside fusions."""
    fused = set(re.findall(r"\bfusion\(.*?calls=%?([\w.-]+)", text))
    for block in re.split(r"\n(?=(?:ENTRY )?%?[\w.-]+ [^\n]*\{\n)", text):
        name = re.match(r"(?:ENTRY )?%?([\w.-]+)", block.strip())
        if name is None or name[1] not in fused:
            yield from INSTRUCTION.findall(block)


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Of each kind: how many stand in the program, and the bytes that they give a device, each run once."""
    found: dict[str, tuple[int, int]] = {}
    for result, operation in _instructions(text):
        kind = operation.removesuffix("-start")
        if kind in COLLECTIVES:
            size = sum(_bytes(*shape) for shape in _shapes(_given(result, operation)))
            count, total = found.get(kind, (0, 0))
            found[kind] = (count + 1, total + size)
    return found


def _given(result: str, operation: str) -> str:
    """The type of what an operation gives: a start's has its operands before, a copy's behind, a sum's none."""
    if operation.endswith("-start") and operation != "all-reduce-start" and result.startswith("("):
        return _parts(result)[0 if operation == "copy-start" else 1]
    return result


def _parts(result: str) -> list[str]:
    """The elements of a tuple's type, which may be tuples."""
    parts, depth = [""], 0
    for letter in result[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def made(text: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """The arrays that a program makes, each with its operation, dtype and shape: not its parameters, nor what is inside
    a fusion, nor what a TPU brings into its vector memory, `S(1)`, to multiply with it.
    """
    for result, operation in _instructions(text):
        if operation not in IN_PLACE and not operation.endswith("-done"):
            for dtype, dims in _shapes(IN_VECTOR_MEMORY.sub("", _given(result, operation))):
                yield operation, dtype, dims


def copies(text: str, rows: int, columns: int) -> list[str]:
    """Operations that make an array of one or more matrices (rows, columns), and its type: weights copied or gathered.

    An array is taken for such if it has an axis of `rows` and as many elements as some of these matrices.
    """
    return [
        f"{operation} {dtype}[{','.join(map(str, dims))}]"
        for operation, dtype, dims in made(text)
        if rows in dims and math.prod(dims) % (rows * columns) == 0
    ]

"""What the text of a compiled program says: its collectives, and for GPUs its kernels and the memory they touch."""

import math
import re
from typing import Any

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_SHAPE = r"(?:\((?:[^()]|\([^()]*\))*\)|\S+)"  # of an array or a tuple
_INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?([\w.-]+) = ({_SHAPE}) ([\w-]+)\((.*)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")

# The first pattern that an instruction's text contains decides its kind.
KINDS = {
    "convolutions": r"__cudnn\$conv",
    "matrix products": r"__cublas\$|calls=%\S*gemm|kind=kCustom.*gemm|cusolver|triangularSolve",
    "other kernels": r"",
}
# Instructions that start no kernel. A loop's kernels are those of its body, and `collectives` counts communication.
_NO_KERNELS = re.compile(
    rf"(parameter|constant|tuple|get-tuple-element|bitcast|partition-id|after-all|{'|'.join(COLLECTIVES)})"
    r"(-start|-done)?"
)


def kernels(hlo: str) -> dict[str, dict[str, int]]:
    """Count and bytes of the kernels of each kind, in one run of a GPU's optimised program.

    The bytes are those that the kernels read and write, if each reads its operands once and writes its results once. A
    kernel that changes a part of an array counts with the whole array. Loops count as often as they run, if the program
    says how often, and otherwise once.
    """
    found = {kind: {"count": 0, "bytes": 0} for kind in KINDS}
    _count(_computations(hlo), "ENTRY", 1, found)
    return found


def _count(computations: dict[str, list[str]], name: str, runs: int, found: dict[str, dict[str, int]]) -> None:
    """Adds the kernels of a computation that runs so many times."""
    shapes = dict[str, str]()
    for line in computations[name]:
        if not (match := _INSTRUCTION.match(line)):
            continue
        result, shape, operation, rest = match.groups()
        shapes[result] = shape
        if operation == "while":
            trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
            body = re.search(r"body=%?([\w.-]+)", rest)
            assert body is not None
            _count(computations, body[1], runs * int(trips[1] if trips else 1), found)
        elif not _NO_KERNELS.fullmatch(operation):
            kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, line))
            operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
            found[kind]["count"] += runs
            found[kind]["bytes"] += runs * sum(
                array_bytes(text) for text in (shape, *(shapes.get(o, "") for o in operands))
            )


def _computations(hlo: str) -> dict[str, list[str]]:
    """The lines of each computation by its name; the program's own is called ENTRY."""
    found, lines = dict[str, list[str]](), list[str]()
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            lines = found["ENTRY" if match[1] else match[2]] = []
        else:
            lines.append(line)
    return found


def collectives(hlo: str) -> dict[str, dict[str, Any]]:
    """Count, bytes of the results, and bytes and shape of the largest array, of each kind of collective.

    A tuple counts once, with the bytes of all its arrays. A collective in a loop counts as if the loop ran once.
    """
    # An asynchronous collective has a -start and a -done. The -done is counted, because its shape is that of the result
    # alone; the shape of most -starts includes the operands.
    pattern = rf"^\s*(?:ROOT )?%?[\w.-]+ = ({_SHAPE}) ({'|'.join(COLLECTIVES)})(?:-done)?\("
    found: dict[str, dict[str, Any]] = {}
    for shape, kind in re.findall(pattern, hlo, re.MULTILINE):
        arrays = [(_bytes(match), match.group()) for match in _ARRAY.finditer(shape)]
        entry = found.setdefault(kind, {"count": 0, "bytes": 0, "largest": (0, "")})
        entry["count"] += 1
        entry["bytes"] += sum(size for size, _ in arrays)
        entry["largest"] = max(entry["largest"], *arrays)
    return found


def array_bytes(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple, without the padding of their layouts."""
    return sum(_bytes(match) for match in _ARRAY.finditer(shape))


def _bytes(array: re.Match[str]) -> int:
    """Bytes of an array. pred has no number of bits in its name and takes a byte."""
    bits, dimensions = array.groups()
    return -(-int(bits or 8) * math.prod(int(d) for d in dimensions.split(",") if d) // 8)

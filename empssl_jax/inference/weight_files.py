"""Files of weights: a state dictionary (see torch_names.py), and metadata, which are strings.

A .safetensors file needs only this package; a .pt file needs PyTorch. Reading executes no code that a file holds.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Shaped

from empssl_jax.config.errors import UserError, install, one_line
from empssl_jax.runtime.atomic_write import atomic_write

SUFFIXES = {"safetensors": ".safetensors", "torch": ".pt"}
Array = Shaped[np.ndarray, "..."]
Weights = dict[str, Array]
Metadata = dict[str, str]


def write_weights(path: Path, weights: Weights, metadata: Metadata, kind: str) -> None:
    """Writes a file of a kind in SUFFIXES, atomically."""
    weights = {name: np.ascontiguousarray(array) for name, array in weights.items()}  # safetensors ignores strides
    with atomic_write(path) as file:
        if kind == "safetensors":
            file.write(safetensors.numpy.save(weights, metadata))
        else:
            torch = import_torch()
            tensors = {name: torch.tensor(array) for name, array in weights.items()}
            torch.save({"state_dict": tensors, "metadata": metadata}, file)


def read_weights(path: Path) -> tuple[Weights, Metadata]:
    """Reads the arrays of a file, and its metadata if it has any. Numbers of floating point become float32.

    In a file of torch.save, the state dictionary may lie in other dictionaries.

    Raises:
        UserError: there is no such file, it cannot be read, it has several state dictionaries, or numbers of 8 bits.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}: give a file written by `export` or by the authors' code.")
    is_torch = path.suffix != SUFFIXES["safetensors"]
    torch: Any = import_torch() if is_torch else None
    try:
        if is_torch:
            content = torch.load(path, map_location="cpu", weights_only=True)
            tensors = _state_dict(content, path)
            _check_types(path, {name: getattr(tensor, "dtype", None) for name, tensor in tensors.items()})
            weights = {name: _from_tensor(name, tensor) for name, tensor in tensors.items()}
            found = content.get("metadata")  # other programs write other things under this name
            metadata = {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}
        else:
            with safetensors.safe_open(path, framework="numpy") as file:
                names = list(file.keys())
                _check_types(path, {name: file.get_slice(name).get_dtype() for name in names})
                weights = {name: _float32(name, file.get_tensor(name)) for name in names}
                metadata = file.metadata() or {}
        return weights, metadata
    except UserError:
        raise
    except Exception as error:  # the libraries raise various exceptions on other files
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}: {one_line(error)}): give a .safetensors file, or a .pt or "
            ".pth file that contains a state dictionary and nothing else."
        ) from error


def import_torch() -> Any:
    """The module torch; raises UserError if it is not installed."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"Files for torch.load need PyTorch: {install('torch')}, or use a .safetensors file."
        ) from error
    return torch


def _state_dict(content: Any, path: Path) -> dict[str, Any]:
    """The state dictionary of a ResNet in what torch.load returns, else the outermost dictionary."""
    if not isinstance(content, dict):
        raise TypeError(f"it contains a {type(content).__name__}")
    found = dict(_state_dicts(content, ""))
    if len(found) > 1 and "state_dict" not in found:
        shown = ", ".join(map(one_line, list(found)[:3]))
        raise UserError(f"{path} contains {len(found)} ResNets, for example in {shown}: save one of them alone.")
    outermost = content.get("state_dict", content)
    return found.get("state_dict") or next(iter(found.values()), outermost)


def _state_dicts(content: dict[Any, Any], place: str) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Each dictionary with the name of a ResNet's first convolution, and its place in the outermost one."""
    if any(str(name).endswith("conv1.weight") for name in content):
        yield place, content
        return
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _state_dicts(value, f"{place}.{name}" if place else str(name))


def _check_types(path: Path, types: dict[Any, object]) -> None:
    """Raises UserError for floating point of at most 8 bits: NumPy has no such type, and files scale its numbers."""
    for name, kind in types.items():
        if re.match(r"(torch\.float|F)[468]_", str(kind)) or str(kind) == "F4":
            raise UserError(
                f"{path} has arrays of type {kind}, such as {one_line(name)}: give a file that is not quantised."
            )


def _from_tensor(name: object, tensor: Any) -> Array:
    if not (isinstance(name, str) and isinstance(tensor, import_torch().Tensor)):
        raise TypeError(f"{one_line(name)} is no tensor")
    if tensor.is_complex():
        raise TypeError(f"{name} is complex")
    return (tensor.detach().float() if tensor.is_floating_point() else tensor.detach()).numpy()


def _float32(name: str, array: Array) -> Array:
    if np.iscomplexobj(array):
        raise TypeError(f"{name} is complex")
    if array.dtype.kind in "iub":
        return array
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which is refused later
        return array.astype(np.float32)

"""Checks of arguments that several modules share: `<owner>: <argument> must be <expected>, got <actual>`.

Test: the test files of the modules that use them
"""

import numbers
import os

import torch
from torch import Tensor


def got(value: object) -> str:
    """What came, for a message: plain values as they are, of anything else its type."""
    plain = value is None or isinstance(value, (bool, numbers.Number, str))
    return repr(value) if plain else type(value).__name__


def check_type(owner: str, name: str, value: object, types: type | tuple[type, ...], expected: str) -> None:
    """Raises TypeError if value is not of `types`; a bool is no integer."""
    if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
        raise TypeError(f"{owner}: {name} must be {expected}, got {got(value)}")


def check_tensor(owner: str, name: str, value: object, shape: tuple[int, ...] | None = None, dtype=None) -> None:
    """Raises TypeError if value is no tensor or of another dtype, ValueError if it is of another shape."""
    check_type(owner, name, value, Tensor, "a tensor")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{owner}: {name} must be {str(dtype).removeprefix('torch.')}, got {value.dtype}")
    if shape is not None and value.shape != shape:
        raise ValueError(f"{owner}: {name} must have shape {list(shape)}, got {list(value.shape)}")


def check_index(owner: str, name: str, value: object, size: int) -> None:
    """Raises ValueError if value is no integer in [0, size)."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not 0 <= value < size:
        raise ValueError(f"{owner}: {name} must be an integer in [0, {size}), got {got(value)}")


def check_list(owner: str, name: str, values: object, expected: str) -> list:
    """The elements of any iterable but a text or a mapping; TypeError for those and for what is none."""
    if isinstance(values, (str, bytes, dict)):
        raise TypeError(f"{owner}: {name} must be {expected}, got {got(values)}")
    try:
        return list(values)
    except TypeError:
        raise TypeError(f"{owner}: {name} must be {expected}, got {got(values)}") from None


def check_device(owner: str, device: object) -> torch.device:
    """The device that an argument means; TypeError or ValueError if it is none."""
    check_type(owner, "device", device, (torch.device, str, int), "a torch.device or its name")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"{owner}: device must be a torch.device or its name, got {got(device)}") from None
    if found.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{owner}: device must be cpu, cuda or meta, got {found}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{owner}: device must be one that this machine has (torch finds no CUDA), got {found}")
    return found


def first_sentence(error: Exception) -> str:
    """Of its text: torch says in it which operator has no kernel for which device, and adds pages of advice."""
    return str(error).partition("\n")[0].partition(". ")[0].removesuffix(".")


def check_path(owner: str, path: object, name: str = "path") -> None:
    """Raises TypeError if path is neither a string nor a path."""
    check_type(owner, name, path, (str, os.PathLike), "a path")

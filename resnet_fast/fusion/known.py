"""What a ``forward`` may get from outside: constants, PyTorch's functions of tensors, and which of these there are."""

from __future__ import annotations

import enum
import functools
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = [
    "BUILTINS",
    "CONSTANT",
    "SAFE",
    "UNKNOWN",
    "Children",
    "Constants",
    "ImpureError",
    "in_classes",
    "is_hashable",
    "is_layer_code",
    "is_plain",
    "of_tensors",
]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, type(...))
_PLAIN_OF_TORCH = (torch.dtype, torch.device, torch.memory_format, torch.layout)
BUILTINS = {
    *(abs, bool, dict, divmod, enumerate, float, int, isinstance, len, list, max, min, pow, range, reversed, round),
    *(set, slice, sum, tuple, zip, OrderedDict, torch.Size, map, filter, all, any, sorted),
}
# Answered the same at every call that runs fused.
CONSTANT = {torch.jit.is_scripting, torch.jit.is_tracing}
SAFE = {torch._assert, *CONSTANT}


class ImpureError(Exception):
    """Why the code is not shown to be a function of what is known."""


UNKNOWN = object()


@functools.cache
def of_tensors() -> frozenset[Any]:
    """PyTorch's functions that symbols can stand in for: calls of them are repeated, whatever they do."""
    found = set(torch.overrides.get_testing_overrides())
    in_place = {getattr(torch, f"{getattr(f, '__name__', '')}_", None) for f in found}
    return frozenset(found | in_place - {None})


def is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def is_plain(value: Any) -> bool:
    """A constant: nobody can change it in place."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return isinstance(value, (*_PLAIN, *_PLAIN_OF_TORCH))


def in_classes(kind: type, name: str, behind: type | None = None) -> Any:
    """What the classes of ``kind`` have by that name; behind: only those that come after that one."""
    classes = kind.__mro__
    for c in classes[classes.index(behind) + 1 :] if behind is not None else classes:
        if name in vars(c):
            return vars(c)[name]
    return UNKNOWN


def is_layer_code(function: Any) -> bool:
    """The forward of a layer or container of PyTorch's."""
    return str(getattr(function, "__module__", "")).startswith("torch.nn.modules.")


class Children(NamedTuple):
    """The dict of a module's children."""

    module: nn.Module


class Constants(NamedTuple):
    """A dict of constants, which is watched."""

    value: dict[Any, Any]

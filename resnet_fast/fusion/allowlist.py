"""The allowlist of :mod:`.purity`: which values and functions a pure ``forward`` may use from outside.

In comes a value that the code reads, out goes whether it is a constant, a known builtin or one of PyTorch's functions
of tensors. :mod:`.values`, :mod:`.expressions` and :mod:`.statements` ask.
"""

from __future__ import annotations

import enum
import functools
from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = [
    "BUILTINS",
    "FALSE_WHEN_FUSED",
    "SAFE",
    "UNKNOWN",
    "Children",
    "ConstantDict",
    "ImpureError",
    "class_attribute",
    "is_constant",
    "is_hashable",
    "is_layer_code",
    "tensor_functions",
]

_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, enum.Enum, type(...))
_TORCH_CONSTANTS = (torch.dtype, torch.device, torch.memory_format, torch.layout)
BUILTINS = {
    *(abs, bool, dict, divmod, enumerate, float, int, isinstance, len, list, max, min, pow, range, reversed, round),
    *(set, slice, sum, tuple, zip, OrderedDict, torch.Size, map, filter, all, any, sorted),
}
# Every call that runs fused returns False.
FALSE_WHEN_FUSED = {torch.jit.is_scripting, torch.jit.is_tracing}
SAFE = {torch._assert, *FALSE_WHEN_FUSED}


class ImpureError(Exception):
    """Why the code is not shown to be a function of its input and of watched values."""


UNKNOWN = object()  # the value differs from call to call, or no such attribute exists


@functools.cache
def tensor_functions() -> frozenset[Any]:
    """PyTorch's functions that accept proxies: the plan repeats each call, whatever it does."""
    found = set(torch.overrides.get_testing_overrides())
    in_place = {getattr(torch, f"{getattr(f, '__name__', '')}_", None) for f in found}
    return frozenset(found | in_place - {None})


def is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def is_constant(value: Any) -> bool:
    """Whether nobody can change ``value`` in place."""
    if isinstance(value, tuple):
        return all(map(is_constant, value))
    return isinstance(value, (*_CONSTANTS, *_TORCH_CONSTANTS))


def class_attribute(kind: type, name: str, after: type | None = None) -> Any:
    """The attribute as the classes of ``kind`` define it, or UNKNOWN; with ``after``, as ``super()`` finds it."""
    classes = kind.__mro__
    for c in classes[classes.index(after) + 1 :] if after is not None else classes:
        if name in vars(c):
            return vars(c)[name]
    return UNKNOWN


def is_layer_code(function: Any) -> bool:
    """Whether a layer or container of PyTorch defines it."""
    return str(getattr(function, "__module__", "")).startswith("torch.nn.modules.")


class Children(NamedTuple):
    """``module._modules``, which the code may read and not change."""

    module: nn.Module


class ConstantDict(NamedTuple):
    """A dict of constants; a :class:`.module_guard.ModuleGuard` watches its contents."""

    value: dict[Any, Any]

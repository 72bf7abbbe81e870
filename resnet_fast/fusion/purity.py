"""Purity: is a ``forward`` shown to be a function of its input, registered tensors and watched attributes?

:class:`.partition.GraphPartitioner` asks before :mod:`.trace` runs the code once on proxies, as that one graph stands
for every later call. In comes a module, out goes :class:`Purity`. The code is read statement by statement
(:mod:`.statements`, :mod:`.expressions`), and what it uses from outside is checked as it is now (:mod:`.values`).
Allowed are layers and lists of layers, tensors of modules, constants, PyTorch's functions of tensors, and code of the
same kind; a :class:`.module_guard.ModuleGuard` watches all of it later.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

from .allowlist import ImpureError, class_attribute, is_constant, is_layer_code
from .function_source import function_ast
from .statements import read_function
from .values import ValueChecker

__all__ = ["Purity", "purity"]

_MAX_DEPTH = 50  # of calls within calls


class Purity(NamedTuple):
    """reason: why a forward is not shown to be pure, or None. asked: attributes that it reads, by module."""

    reason: str | None
    asked: dict[nn.Module, set[str]]


def purity(module: nn.Module, training: bool) -> Purity:
    """Of the ``forward`` of the module's class in that mode.

    The children's own code is not read; their attributes that this code reads count.
    """
    kind: Any = vars(type(module)).get("fused_from", type(module))
    for name in ("__getattr__", "__getattribute__"):
        if class_attribute(kind, name) not in (class_attribute(nn.Module, name), class_attribute(object, name)):
            return Purity(f"it has a {name} of its own", {})
    checker = _PurityChecker(module, training)
    try:
        if not is_layer_code(kind.forward):
            checker.read(kind.forward, module)
    except ImpureError as error:
        return Purity(str(error), {})
    return Purity(None, checker.asked)


class _PurityChecker(ValueChecker):
    """Reads the code behind calls of ``root``, each function once."""

    def __init__(self, root: nn.Module, training: bool) -> None:
        super().__init__(root, training)
        self._seen: set[tuple[Any, int]] = set()
        self._depth = 0

    def read(
        self, function: Any, module: nn.Module | None, modules_in: Mapping[str, Iterable[nn.Module]] | None = None
    ) -> None:
        if isinstance(function, functools.partial):
            for value in (*function.args, *function.keywords.values()):
                self.value(value, "an argument of a partial function")
            self.read(function.func, module)
            return
        if not isinstance(function, FunctionType) or str(function.__module__).partition(".")[0] == "torch":
            module_name, name = (getattr(function, part, "") for part in ("__module__", "__qualname__"))
            raise ImpureError(f"it calls {module_name}.{name}")
        key = (function, id(module))
        if key in self._seen and not modules_in:
            return
        if self._depth > _MAX_DEPTH:
            raise ImpureError(f"{function.__qualname__} calls itself")
        self._seen.add(key)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if not is_constant(default):
                raise ImpureError(f"{function.__qualname__} has a default that can change")
        node = function_ast(function.__code__)
        if isinstance(node, str):
            raise ImpureError(f"it runs {function.__qualname__}, {node}")
        self._depth += 1
        read_function(self, node, function, module, modules_in or {})
        self._depth -= 1

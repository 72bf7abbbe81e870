"""Whether the code of a ``forward`` is shown to be a function of its input, registered tensors and plain attributes.

Symbols go through the code once (:mod:`.trace`), and what they met stands for every later call. So nothing
is allowed but what is known to be repeated that way. The code is read statement by statement, and what it gets from
outside - attributes of modules, global names, functions - is looked at as it is. Known are layers and lists of layers,
tensors of modules, constants, PyTorch's functions of tensors, and code of the same kind; all of it is watched later.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import nn

from ..chain import patches
from .known import (
    BUILTINS,
    SAFE,
    UNKNOWN,
    Constants,
    ImpureError,
    in_classes,
    is_hashable,
    is_layer_code,
    is_plain,
    of_tensors,
)
from .source import source_of
from .statements import Code

__all__ = ["Purity", "Reader", "purity"]


class Reader:
    """Reads the code behind calls of ``root``; what it has read once, it does not read again."""

    def __init__(self, root: nn.Module, training: bool) -> None:
        self.root, self.training = root, training
        self.asked: dict[nn.Module, set[str]] = {}
        self.known: set[tuple[Any, int]] = set()
        self.stack: list[tuple[Any, int]] = []

    def read(
        self, function: Any, module: nn.Module | None, held: Mapping[str, Iterable[nn.Module]] | None = None
    ) -> None:
        """``function`` is called; module: what it is bound to; held: modules in its arguments, by their names."""
        if isinstance(function, functools.partial):
            for value in (*function.args, *function.keywords.values()):
                self.value(value, "an argument of a partial function")
            self.read(function.func, module)
            return
        if not isinstance(function, FunctionType) or str(function.__module__).partition(".")[0] == "torch":
            module_name, name = (getattr(function, part, "") for part in ("__module__", "__qualname__"))
            raise ImpureError(f"it calls {module_name}.{name}")
        key = (function, id(module))
        if key in self.known and not held:
            return
        if len(self.stack) > 50:
            raise ImpureError(f"{function.__qualname__} calls itself")
        self.known.add(key)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if not is_plain(default):
                raise ImpureError(f"{function.__qualname__} has a default that can change")
        node = source_of(function.__code__)
        if isinstance(node, str):
            raise ImpureError(f"it runs {function.__qualname__}, {node}")
        self.stack.append(key)
        Code(self, function, module, held or {}).all_of(node)
        self.stack.pop()

    def attribute(self, module: nn.Module, name: str) -> Any:
        """``module.name`` as it is now, which must be of a known kind."""
        self.asked.setdefault(module, set()).add(name)
        own = in_classes(type(module), name)
        if isinstance(own, property):
            self.read(own.fget, module)
            return UNKNOWN
        if name in vars(module):
            value = vars(module)[name]
            if getattr(value, "__self__", None) is module and isinstance(value, MethodType):
                self.read(value.__func__, module)
                return UNKNOWN
            return self.value(value, f"{type(module).__name__}.{name}")
        for store in (module._modules, module._parameters, module._buffers):
            if name in store:
                return store[name] if store is module._modules else UNKNOWN
        if own is UNKNOWN:
            return UNKNOWN  # the code raises when it comes here
        if isinstance(own, FunctionType):
            self.method(own, module)
            return UNKNOWN
        if isinstance(own, (staticmethod, classmethod)):
            self.read(own.__func__, None)
            return UNKNOWN
        return self.value(own, f"{type(module).__name__}.{name}")

    def method(self, function: FunctionType, module: nn.Module) -> None:
        """Of a class. Of PyTorch's, the code of layers is known; other methods of modules change them."""
        if function.__globals__.get("__name__") == nn.Module.__module__:
            raise ImpureError(f"it asks for {type(module).__name__}.{function.__name__}")
        if not is_layer_code(function):
            self.read(function, module)
        elif function.__name__ not in (*patches.called(type(module)), "keys", "items", "values"):
            raise ImpureError(f"it asks for {type(module).__name__}.{function.__name__}")

    def value(self, value: Any, what: str) -> Any:
        """A value from outside: known, or refused. Functions among them are read."""
        if is_plain(value) or isinstance(value, ModuleType):
            return value
        if type(value) is dict and all(is_plain(v) for v in (*value, *value.values())):
            return Constants(value)  # what is in it is watched
        if is_hashable(value) and (value in BUILTINS or value in SAFE or value in of_tensors()):
            return value
        if isinstance(value, (FunctionType, functools.partial)):
            self.read(value, None)
            return value
        if isinstance(value, BuiltinFunctionType) and value.__module__ in ("math", "_operator"):
            return value
        if callable(value) and not isinstance(value, nn.Module):
            raise ImpureError(f"it calls {what}")
        raise ImpureError(f"it reads {what}, a {type(value).__name__}")


class Purity(NamedTuple):
    """reason: why a forward is not shown to be pure, or None. asked: what it asks modules for, itself among them."""

    reason: str | None
    asked: dict[nn.Module, set[str]]


def purity(module: nn.Module, training: bool) -> Purity:
    """Of the ``forward`` of the module's class in that mode.

    What it calls of its children is their own affair; their attributes that it asks for are not.
    """
    kind: Any = vars(type(module)).get("fused_from", type(module))
    for name in ("__getattr__", "__getattribute__"):
        if in_classes(kind, name) not in (in_classes(nn.Module, name), in_classes(object, name)):
            return Purity(f"it has a {name} of its own", {})
    reader = Reader(module, training)
    try:
        if not is_layer_code(kind.forward):
            reader.read(kind.forward, module)
    except ImpureError as error:
        return Purity(str(error), {})
    return Purity(None, reader.asked)

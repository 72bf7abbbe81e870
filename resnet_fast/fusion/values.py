"""Values that a ``forward`` reads from outside: attributes of modules, globals, functions. Known, or ImpureError.

In comes a value or a module and an attribute name, out goes the value where it is the same at every call, else UNKNOWN.
:mod:`.expressions` asks for each name and attribute in the code; :mod:`.purity` says how a function
among the values is read.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from ..chain import patches
from .allowlist import (
    BUILTINS,
    SAFE,
    UNKNOWN,
    Children,
    ConstantDict,
    ImpureError,
    class_attribute,
    is_constant,
    is_hashable,
    is_layer_code,
    tensor_functions,
)

__all__ = ["OF_MODULES", "SuperProxy", "ValueChecker"]

# Methods of a module that return its children.
OF_MODULES = {"children", "named_children", "modules", "named_modules"}
_OF_VALUES = {name for kind in (Tensor, list, dict, tuple, str) for name in dir(kind)}


class ValueChecker:
    """Checks values for the code behind calls of ``root``, and notes in ``asked`` which attributes it reads."""

    def __init__(self, root: nn.Module, training: bool) -> None:
        self.root, self.training = root, training
        self.asked: dict[nn.Module, set[str]] = {}

    def read(
        self, function: Any, module: nn.Module | None, modules_in: Mapping[str, Iterable[nn.Module]] | None = None
    ) -> None:
        """The code calls ``function``. module: what it is bound to. modules_in: modules in its arguments, by name."""
        raise NotImplementedError(f"{type(self).__name__}.read")

    def attribute(self, module: nn.Module, name: str) -> Any:
        """``module.name``, also where that is the mode, the children or a method that returns them."""
        if name in OF_MODULES and class_attribute(type(module), name) is class_attribute(nn.Module, name):
            return UNKNOWN
        if name == "_modules":
            return Children(module)
        return self.training if name == "training" else self._stored(module, name)

    def _stored(self, module: nn.Module, name: str) -> Any:
        self.asked.setdefault(module, set()).add(name)
        own = class_attribute(type(module), name)
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
            return UNKNOWN  # the code raises AttributeError here
        if isinstance(own, FunctionType):
            self.method(own, module)
            return UNKNOWN
        if isinstance(own, (staticmethod, classmethod)):
            self.read(own.__func__, None)
            return UNKNOWN
        return self.value(own, f"{type(module).__name__}.{name}")

    def attribute_of_unknown(self, name: str) -> Any:
        """``value.name`` where the value is a tensor, a list or any module of the network: all that have it count."""
        modules = list(self.root.modules())
        holders = [m for m in modules if name in vars(m) or _own_class_has(m, name)]
        if not holders and name not in _OF_VALUES and name not in OF_MODULES:
            stores = (store for m in modules for store in (m._modules, m._parameters, m._buffers))
            if not any(name in store for store in stores):
                raise ImpureError(f"it asks for an attribute {name}")
        for m in holders:
            self.attribute(m, name)
        return UNKNOWN

    def method(self, function: FunctionType, module: nn.Module) -> None:
        """A method of a class. The layers' own code is known; ``nn.Module``'s methods change the module."""
        if function.__globals__.get("__name__") == nn.Module.__module__:
            raise ImpureError(f"it asks for {type(module).__name__}.{function.__name__}")
        if not is_layer_code(function):
            self.read(function, module)
        elif function.__name__ not in (*patches.called(type(module)), "keys", "items", "values"):
            raise ImpureError(f"it asks for {type(module).__name__}.{function.__name__}")

    def value(self, value: Any, what: str) -> Any:
        """``value``, called ``what`` in the error; functions are read."""
        if is_constant(value) or isinstance(value, ModuleType):
            return value
        if type(value) is dict and all(is_constant(v) for v in (*value, *value.values())):
            return ConstantDict(value)
        if is_hashable(value) and (value in BUILTINS or value in SAFE or value in tensor_functions()):
            return value
        if isinstance(value, (FunctionType, functools.partial)):
            self.read(value, None)
            return value
        if isinstance(value, BuiltinFunctionType) and value.__module__ in ("math", "_operator"):
            return value
        if callable(value) and not isinstance(value, nn.Module):
            raise ImpureError(f"it calls {what}")
        raise ImpureError(f"it reads {what}, a {type(value).__name__}")


class SuperProxy:
    """``super()`` in a method of ``owner``."""

    def __init__(self, values: ValueChecker, module: nn.Module, owner: type) -> None:
        self.values, self.module, self.owner = values, module, owner

    def attribute(self, name: str) -> Any:
        value = class_attribute(type(self.module), name, self.owner)
        if isinstance(value, FunctionType):
            self.values.method(value, self.module)
            return UNKNOWN
        return self.values.value(value, f"super().{name}")


def _own_class_has(module: nn.Module, name: str) -> bool:
    """Whether a class that is not PyTorch's gives the module this attribute."""
    return any(
        name in vars(c) for c in type(module).__mro__ if not str(c.__module__).startswith(("torch.", "builtins"))
    )

"""Is the code of a module still what :func:`resnet_fast.fuse` read? A :class:`ModuleGuard` says what has changed since.

:mod:`.partition` makes one for each module whose code went into a plan; :mod:`.execution_plan` asks it before the plan
runs. A guard holds paths and fingerprints, no modules: it goes with its network into copies and pickles.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from ..chain import patches
from ..chain.guard import attributes

__all__ = ["ModuleGuard", "Path", "find", "guarded_modules", "original"]

Path = tuple[str, ...]

_CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format)


def find(owner: nn.Module, path: Path) -> nn.Module | None:
    module: nn.Module | None = owner
    for name in path:
        module = None if module is None else module._modules.get(name)
    return module


def original(module: nn.Module) -> type[nn.Module]:
    """The class as it was before :func:`resnet_fast.fuse`; a subclass that others make of a fused class is itself."""
    kind: Any = type(module)
    return kind.fused_from if _made_by_fuse(kind) else kind


@patches.constant
def _made_by_fuse(kind: type[nn.Module]) -> bool:
    return "fused_from" in vars(kind)


class ModuleGuard:
    """A module whose code was read: whatever the code depends on, except for tensors, must stay."""

    def __init__(self, owner: nn.Module, path: Path, asked: Iterable[str] = ()) -> None:
        """asked: attributes that the code reads, whether the module has them or not."""
        module = find(owner, path)
        assert module is not None
        self.path = path
        self.kind = original(module)
        self.attributes = {name: _fingerprint(value) for name, value in attributes(module).items()}
        # An instance attribute would hide the method of the class. For forward itself see hooks_reason.
        self.methods = [name for name in patches.called(self.kind)[1:] if name not in self.attributes]
        stores = (self.attributes, module._modules, module._parameters, module._buffers)
        self.absent = sorted(name for name in asked if not any(name in store for store in stores))
        self.code = patches.digest(self.kind, tuple(self.absent))
        self.children = [(name, child is None) for name, child in module._modules.items()]
        self._read: list[Any] | None = self._functions(module)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read": None}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModuleGuard) and self.__getstate__() == other.__getstate__()

    __hash__ = None  # type: ignore[assignment]

    def reason(self, owner: nn.Module) -> str | None:
        """Why the code may do something else by now, or None."""
        module = find(owner, self.path)
        name = ".".join(self.path) or "the module"
        if module is None:
            return f"{name} is gone"
        if original(module) is not self.kind:
            return f"a {type(module).__name__} where a {self.kind.__name__} was"
        if self._has_other_code(module):
            return f"another forward of {self.kind.__name__}, or of what it calls"
        now = vars(module)  # looked up by name: Dynamo of some releases of PyTorch cannot iterate over it
        for method in self.methods:
            if method in now:
                return f"a {self.kind.__name__} with a {method} of its own"
        for name in self.absent:
            if name in now or name in module._parameters or name in module._buffers:
                return f"a {self.kind.__name__} with a {name}"
        for attribute, fingerprint in self.attributes.items():
            if attribute not in now or _fingerprint(now[attribute]) != fingerprint:
                return f"another value of {self.kind.__name__}.{attribute}"
        if [(child, m is None) for child, m in module._modules.items()] != self.children:
            return f"other children of a {self.kind.__name__}"
        return None

    def _functions(self, module: nn.Module) -> list[Any]:
        """Functions behind a call, also in the module's own attributes, and what they find outside."""
        return patches.functions(self.kind, self.absent) + patches.surroundings(attributes(module).values()).values()

    def _has_other_code(self, module: nn.Module) -> bool:
        if torch.compiler.is_compiling() or self._read is None:
            changed = self.code != patches.digest(self.kind, tuple(self.absent))
            if not changed and not torch.compiler.is_compiling():
                self._read = self._functions(module)
            return changed
        now = self._functions(module)
        return len(now) != len(self._read) or not all(map(is_, now, self._read))


def _fingerprint(value: Any) -> Any:
    """Tells an attribute from another one, in a copy or another process, too."""
    if isinstance(value, _CONSTANTS):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_fingerprint, value))
    if isinstance(value, dict):
        return tuple((_fingerprint(k), _fingerprint(v)) for k, v in value.items())
    if isinstance(value, FunctionType):
        return value.__module__, value.__qualname__, value.__code__.co_firstlineno
    if isinstance(value, BuiltinFunctionType):
        return value.__module__, value.__qualname__
    return type(value).__module__, type(value).__qualname__


def guarded_modules(owner: nn.Module, guards: Iterable[ModuleGuard]) -> dict[nn.Module, list[str]]:
    """The modules of ``guards``, each with the attributes that its code reads and that it lacks."""
    found = ((find(owner, guard.path), guard.absent) for guard in guards)
    return {module: absent for module, absent in found if module is not None}

"""Has a module changed since it was packed? Asked at every call, so it costs a few microseconds a block."""

from __future__ import annotations

from array import array
from collections.abc import Sequence, Sized
from itertools import chain
from typing import Any

import torch
from torch import nn

from .backends import native

__all__ = ["DROPOUTS", "Watch", "attributes", "hooks_reason", "uncounted_reason"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONTENTS: tuple[Any, ...] = (torch.Tensor._version,)
_KIND: tuple[Any, ...] = (torch.Tensor.dtype, torch.Tensor.device, torch.Tensor.shape)
DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_SETTINGS: dict[type, tuple[str, ...]] = {
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm2d: ("eps", "training"),
    **dict.fromkeys(DROPOUTS, ("training", "p")),
}


# What every module has; ``training`` is asked for where it matters.
_OF_ALL_MODULES = {*vars(nn.Module()), "_chain", "_program", "_whole", "_resnet_fast", "_is_full_backward_hook"}


def attributes(module: nn.Module) -> dict[str, Any]:
    """What the code of ``forward`` may ask for beside children and tensors."""
    return {name: value for name, value in vars(module).items() if name not in _OF_ALL_MODULES}


def hooks_reason(parts: list[nn.Module]) -> str | None:
    """Why the modules after the first must be called one by one, or None. Hooks on the first itself run either way."""
    for module in parts[1:]:
        if any(getattr(module, hooks) for hooks in _HOOKS):
            return f"a hook on a {type(module).__name__}"
        if "forward" in module.__dict__:
            return f"a {type(module).__name__} with a forward of its own"
    return None


def uncounted_reason(parts: list[nn.Module]) -> str | None:
    """Why changes of the modules' tensors could not be seen, or None."""
    stores = (store for module in parts for store in (module._parameters, module._buffers))
    if any(t is not None and t.is_inference() for store in stores for t in store.values()):
        return "weights made in inference mode, whose changes are not counted"
    return None


class _Snapshot:
    """Counts and objects in a row, for ``unchanged`` of ``kernels/csrc/watch.cpp``, which reads them in this order."""

    def __init__(self) -> None:
        self.words = array("Q")
        self.held: list[Any] = []  # so that no address becomes that of another object

    def count(self, of: Sized) -> None:
        self.words.append(len(of))

    def add(self, *objects: Any) -> None:
        self.held += objects
        self.words.extend(map(id, objects))


class Watch:
    """What modules were like when they were packed: their children, settings, hooks, and the contents of their tensors.

    Contents are told by PyTorch's own count of in-place changes (``Tensor._version``) and by the address of the memory.
    Changes through ``Tensor.data`` or a NumPy view are not counted by PyTorch, so they are not seen here either.
    Without ``contents`` only what tensors there are and their dtypes, devices and shapes count. All else is told by
    identity: a setting that is set to an equal value is another one, and only packed once more.
    """

    def __init__(self, modules: list[nn.Module], opened: Sequence[nn.Module] = (), *, contents: bool = True) -> None:
        was = _Snapshot()
        was.count(modules)
        for m in modules:
            # Where a module's own code was looked into, its other attributes count, too.
            settings = (names for kind, names in _SETTINGS.items() if isinstance(m, kind))
            names = [*next(settings, ()), *(attributes(m) if m in opened else ())]
            was.add(m, type(m), vars(m))
            was.count(names)
            was.add(*chain.from_iterable((name, vars(m)[name]) for name in names))
        stores = [store for m in modules for store in (m._parameters, m._buffers) if store]
        children = [m._modules for m in modules if m._modules]
        was.count((*stores, *children))
        for entries in (*stores, *children):
            was.add(entries)
            was.count(entries)
            was.add(*entries.values())
        hooks = [getattr(m, hooks) for m in modules[1:] for hooks in _HOOKS]
        was.count(hooks)
        was.add(*hooks)
        # A count of batches changes no result.
        tensors = [t for store in stores for t in store.values() if t is not None and t.is_floating_point()]
        asked = _CONTENTS if contents else _KIND
        was.count(asked)
        for attribute in asked:
            was.add(attribute)
            was.count(tensors)
            was.add(*chain.from_iterable((t, attribute.__get__(t)) for t in tensors))
        # Aliases keep the memory from being given to someone else, whose address would look like the old one.
        self._aliases = [t.detach() for t in tensors if contents]
        was.count(self._aliases)
        was.add(*chain.from_iterable((t.data_ptr, t.data_ptr()) for t in tensors if contents))
        self._held, self._snapshot = was.held, was.words.tobytes()

    def __reduce__(self) -> Any:
        raise TypeError("a Watch knows its objects by their addresses: a copy would not hold them")

    def unchanged(self) -> bool:
        """In C: this is asked before every fused call."""
        return native.unchanged(self._snapshot)

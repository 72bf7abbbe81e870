"""Has a module changed since it was packed? Asked at every call, so it costs a few microseconds a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from operator import attrgetter, contains, is_, itemgetter, methodcaller
from typing import Any

from torch import Tensor, nn

__all__ = ["DROPOUTS", "Watch", "attributes", "hooks_reason", "uncounted_reason"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_values = methodcaller("values")
_version = attrgetter("_version")
_kind = attrgetter("dtype", "device", "shape")
DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_SETTINGS: dict[type, Callable[[Any], Any]] = {
    nn.Conv2d: itemgetter("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm2d: itemgetter("eps", "training"),
    **dict.fromkeys(DROPOUTS, itemgetter("training", "p")),
}


# What every module has; ``training`` is asked for where it matters.
_OF_ALL_MODULES = {*vars(nn.Module()), "_chain", "_program", "_whole", "_resnet_fast", "_is_full_backward_hook"}


def attributes(module: nn.Module) -> dict[str, Any]:
    """What the code of ``forward`` may ask for beside children and tensors."""
    return {name: value for name, value in vars(module).items() if name not in _OF_ALL_MODULES}


class _Attributes:
    """Attributes by identity; by value where that is as good, and quicker."""

    def __init__(self, module: nn.Module) -> None:
        self._now = vars(module)
        values = attributes(module)
        simple = [name for name, value in values.items() if type(value) in (bool, int, str, float, type(None))]
        self._simple = itemgetter(*simple) if simple else None
        self._others = [(name, value) for name, value in values.items() if name not in simple]
        self._before = self._simple(self._now) if self._simple else None

    def unchanged(self) -> bool:
        try:
            same = self._simple is None or self._simple(self._now) == self._before
            return same and (not self._others or all(self._now[name] is value for name, value in self._others))
        except KeyError:
            return False


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


class Watch:
    """What modules were like when they were packed: their children, settings, hooks, and the contents of their tensors.

    Contents are told by PyTorch's own count of in-place changes (``Tensor._version``) and by the address of the memory.
    Changes through ``Tensor.data`` or a NumPy view are not counted by PyTorch, so they are not seen here either.
    Without ``contents`` only what tensors there are and their dtypes, devices and shapes count.
    """

    def __init__(self, modules: list[nn.Module], opened: Sequence[nn.Module] = (), *, contents: bool = True) -> None:
        self._modules = modules
        self._dicts = [vars(m) for m in modules[1:]]
        # Where a module's own code was looked into, its other attributes count, too.
        self._attributes = [_Attributes(m) for m in opened]
        self._classes = [type(m) for m in modules]
        self._families = [m._modules for m in modules if m._modules]
        self._children = self._children_now()
        self._hooks = [getattr(m, hooks) for m in modules[1:] for hooks in _HOOKS]
        self._settings = [(_SETTINGS[type(m)], vars(m)) for m in modules if type(m) in _SETTINGS]
        self._settings_before = self._settings_now()
        self._stores = [store for m in modules for store in (m._parameters, m._buffers) if store]
        self._entries = self._entries_now()
        # A count of batches changes no result.
        self._tensors = [t for t in self._entries if t is not None and t.is_floating_point()]
        # Aliases keep the memory from being given to someone else, whose address would look like the old one.
        self._aliases = [t.detach() for t in self._tensors if contents]
        self._state: list[Callable[[Tensor], Any]] = [_version, Tensor.data_ptr] if contents else [_kind]
        self._before = self._state_now()

    def _settings_now(self) -> list[Any]:
        return [get(settings) for get, settings in self._settings]

    def _children_now(self) -> list[Any]:
        return list(chain.from_iterable(map(_values, self._families)))

    def _entries_now(self) -> list[Tensor | None]:
        return list(chain.from_iterable(map(_values, self._stores)))

    def _state_now(self) -> list[list[Any]]:
        return [list(map(get, self._tensors)) for get in self._state]

    def unchanged(self) -> bool:
        # Loops in C throughout: this is asked before every fused call.
        entries = self._entries_now()
        return (
            len(entries) == len(self._entries)
            and all(map(is_, entries, self._entries))
            and self._state_now() == self._before
            and self._settings_now() == self._settings_before
            and all(map(_Attributes.unchanged, self._attributes))
            and not any(self._hooks)
            and not any(map(contains, self._dicts, repeat("forward")))
            and list(map(type, self._modules)) == self._classes
            and self._children_now() == self._children
        )

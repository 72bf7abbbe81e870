"""The class that :func:`resnet_fast.fuse` gives a module: a subclass of its own class, whose ``forward`` runs a plan.

Calls of the module come in here; its :class:`.convert.FusionState` runs them, or the ``forward`` of the class behind.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar

from torch import Tensor, nn

from .. import backends
from ..chain import patches
from ..chain.guard import touched
from ..chain.plain import as_plain
from .module_guard import original

__all__ = ["ConvertedModule", "are_tensors", "fused_class", "has_proxies", "tensor_inputs"]


class _NoState:
    """Stands for the FusionState of a module that its class has made, as slices are, and ``fuse`` has not seen."""

    owner = one = None

    def of(self, owner: nn.Module) -> _NoState:
        return self

    def run(self, module: ConvertedModule, args: Any, kwargs: Any) -> Any:
        """By the forward of the class behind; counted as a fallback where ``fuse`` would have helped."""
        forward = module.fused_from.forward
        if not has_proxies(args, kwargs):
            _, inputs = tensor_inputs(forward, module, args, kwargs)
            if are_tensors(inputs):
                backends.decline(type(module).__name__, "made since by its class: fuse it")
        return forward(module, *args, **kwargs)

    def forget(self) -> None:
        """Nothing is packed."""


class ConvertedModule(nn.Module):
    """Mixin of the classes that :func:`fused_class` makes."""

    fused_from: ClassVar[type[nn.Module]]
    _resnet_fast: Any = _NoState()  # or its FusionState

    def train(self, mode: bool = True) -> ConvertedModule:
        if mode != self.training:
            self._resnet_fast.forget()
        touched(self)
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """By ``load_state_dict`` of this module and of those around it."""
        super()._load_from_state_dict(*args, **kwargs)
        touched(self)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles instead."""
        return as_plain(self, original(self), ("_resnet_fast",))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the class behind: pickle finds no name for this one."""
        reduced: Any = super().__reduce_ex__(protocol)
        function, args, *rest = reduced
        if type(self) not in args:
            return (function, args, *rest)
        place = args.index(type(self))
        return (_rebuild, (self.fused_from, function, args[:place], args[place + 1 :]), *rest)


def _rebuild(kind: type[nn.Module], function: Any, before: Any, after: Any) -> Any:
    return function(*before, fused_class(kind), *after)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def fused_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``kind`` that runs plans, the same at every call: ``forward`` has the signature of the original."""
    if kind in _classes:
        return _classes[kind]

    @functools.wraps(kind.forward)
    def forward(self: ConvertedModule, *args: Any, **kwargs: Any) -> Any:
        # Guards watch all functions that this one finds by a global name: it calls methods alone.
        state = self._resnet_fast
        if state.owner is not self:
            state = state.of(self)
        # Most calls: a module that is one chain in both modes, and the tensor that it wants.
        one = state.one
        if one is not None and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            y = one.fused(args[0])
            return kind.forward(self, *args) if y is None else y
        return state.run(self, args, kwargs)

    names = {"fused_from": kind, "forward": forward, "__doc__": kind.__doc__, "__module__": __name__}
    _classes[kind] = type(f"Fused{kind.__name__}", (ConvertedModule, kind), names)
    patches.register(_classes[kind], alone=True)  # the class behind may have been patched by the next fuse
    return _classes[kind]


def has_proxies(args: Any, kwargs: Any) -> bool:
    """Whether a tracer such as ``torch.fx`` makes the call."""
    return any(not isinstance(a, Tensor) and hasattr(type(a), "__torch_function__") for a in (*args, *kwargs.values()))


def are_tensors(inputs: list[Any] | None) -> bool:
    """Whether all are, or nothing is known of them."""
    return inputs is None or all(isinstance(a, Tensor) for a in inputs)


def tensor_inputs(forward: Any, module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[str, ...], list[Any] | None]:
    """Which arguments with a default of None are given a tensor, and the inputs of a plan for such a call.

    These are the arguments without a default and those tensors, in order; None if another argument differs from its
    default.
    """
    signature = inspect.signature(forward)
    try:
        given = signature.bind(module, *args, **kwargs).arguments
    except TypeError:  # forward itself will raise it
        return (), None
    inputs, names = [], []
    for name, p in list(signature.parameters.items())[1:]:
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            inputs.append(given[name])
        elif name in given and given[name] is not p.default:
            if p.default is not None or p.kind is not p.POSITIONAL_OR_KEYWORD or not isinstance(given[name], Tensor):
                return (), None
            inputs.append(given[name])
            names.append(name)
    return tuple(names), inputs

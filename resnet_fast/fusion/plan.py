"""What a fused module runs: chains of its own layers, found by their paths, and around them what its forward did.

A plan is plain data: paths, classes, settings. Modules are looked up when it runs, so that it goes with its module into
copies and pickles, and sees what was replaced since.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from operator import is_
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..chain import patches
from ..chain.executor import ChainExecutor
from ..chain.frozen_norm import FrozenNorm
from ..chain.guard import StalenessGuard, attributes, hooks_reason
from ..chain.record import ChainRecorder, GraphBuilder

__all__ = ["LayerPaths", "ModuleGuard", "Plan", "Ref", "Segment", "Step", "Unplanned", "find", "original"]

Path = tuple[str, ...]

# A ReLU that is a function in the code of forward.
_RELU = nn.ReLU()
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format)


def find(owner: nn.Module, path: Path) -> nn.Module | None:
    module: nn.Module | None = owner
    for name in path:
        module = None if module is None else module._modules.get(name)
    return module


def original(module: nn.Module) -> type[nn.Module]:
    """The class as it was before :func:`resnet_fast.fuse`; subclasses of what that made are classes of their own."""
    kind: Any = type(module)
    return kind.fused_from if _made_by_fuse(kind) else kind


@patches.constant
def _made_by_fuse(kind: type[nn.Module]) -> bool:
    return "fused_from" in vars(kind)


def _essence(value: Any) -> Any:
    """Enough of an attribute to see that it is another one, in a copy or another process, too."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_essence, value))
    if isinstance(value, dict):
        return tuple((_essence(k), _essence(v)) for k, v in value.items())
    if isinstance(value, FunctionType):
        return value.__module__, value.__qualname__, value.__code__.co_firstlineno
    if isinstance(value, BuiltinFunctionType):
        return value.__module__, value.__qualname__
    return type(value).__module__, type(value).__qualname__


class ModuleGuard:
    """A module whose code was read: what the code may depend on, beside tensors, must stay."""

    def __init__(self, owner: nn.Module, path: Path, asked: Iterable[str] = ()) -> None:
        """asked: what the code asks for, there or not."""
        module = find(owner, path)
        assert module is not None
        self.path = path
        self.kind = original(module)
        self.attributes = {name: _essence(value) for name, value in attributes(module).items()}
        # What would come before a method of the class if the module had it. Its forward: see hooks_reason.
        self.methods = [name for name in patches.called(self.kind)[1:] if name not in self.attributes]
        stores = (self.attributes, module._modules, module._parameters, module._buffers)
        self.absent = sorted(name for name in asked if not any(name in store for store in stores))
        self.code = patches.digest(self.kind, tuple(self.absent))
        self.children = [(name, child is None) for name, child in module._modules.items()]
        self._read: list[Any] | None = self._code_of(module)

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
        if self._other_code(module):
            return f"another forward of {self.kind.__name__}, or of what it calls"
        now = vars(module)  # looked into by name: the compiler of some releases of PyTorch cannot list it
        for method in self.methods:
            if method in now:
                return f"a {self.kind.__name__} with a {method} of its own"
        for name in self.absent:
            if name in now or name in module._parameters or name in module._buffers:
                return f"a {self.kind.__name__} with a {name}"
        for attribute, essence in self.attributes.items():
            if attribute not in now or _essence(now[attribute]) != essence:
                return f"another value of {self.kind.__name__}.{attribute}"
        if [(child, m is None) for child, m in module._modules.items()] != self.children:
            return f"other children of a {self.kind.__name__}"
        return None

    def _code_of(self, module: nn.Module) -> list[Any]:
        """Functions behind a call, those of the module's own attributes among them, and what they find outside."""
        return patches.functions(self.kind, self.absent) + patches.surroundings(attributes(module).values()).values()

    def _other_code(self, module: nn.Module) -> bool:
        if torch.compiler.is_compiling() or self._read is None:
            changed = self.code != patches.digest(self.kind, tuple(self.absent))
            if not changed and not torch.compiler.is_compiling():
                self._read = self._code_of(module)
            return changed
        now = self._code_of(module)
        return len(now) != len(self._read) or not all(map(is_, now, self._read))


def _found_in(owner: nn.Module, parts: Iterable[ModuleGuard]) -> dict[nn.Module, list[str]]:
    """The modules, each with the attributes that its code asks for and that it lacks."""
    found = ((find(owner, opened.path), opened.absent) for opened in parts)
    return {module: absent for module, absent in found if module is not None}


class LayerPaths(NamedTuple):
    """``[relu](bn(conv(source)) [+ residual])``; values are numbered as in a chain: 0 is the input."""

    conv: Path
    bn: Path | None
    relu: Path | None  # () for a function
    source: int
    residual: int | None
    frozen_eps: float | None = None  # of a batch norm whose class is none: resnet_fast.chain.frozen_norm


class Ref(NamedTuple):
    """A value of the forward that is under way."""

    number: int


class _Named(NamedTuple):
    """A function in a pickle."""

    module: str
    name: str


@dataclass
class Step:
    """One node of the graph: a call, or the run of a segment."""

    kind: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: int
    free: tuple[int, ...] = ()  # values that nobody reads afterwards

    def __getstate__(self) -> dict[str, Any]:
        """Some functions of PyTorch's are made by others, so that pickle does not find them by their qualified name."""
        module, name = (getattr(self.target, key, None) for key in ("__module__", "__name__"))
        made = callable(self.target) and getattr(self.target, "__qualname__", name) != name
        if made and getattr(sys.modules.get(str(module)), str(name), None) is self.target:
            return {**self.__dict__, "target": _Named(str(module), str(name))}
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.target, _Named):
            self.target = getattr(import_module(self.target.module), self.target.name)


class Segment(ChainExecutor):
    """A chain of layers inside its owner, and the steps that they were."""

    owner: nn.Module

    def __init__(
        self,
        layers: list[LayerPaths],
        through: list[tuple[Path, type[nn.Module]]],
        opened: list[ModuleGuard],
        steps: list[Step],
    ) -> None:
        self.layers, self.through, self.opened_parts, self.steps = layers, through, opened, steps
        self.frozen = any(layer.frozen_eps is not None for layer in layers)

    @property
    def training(self) -> bool:  # type: ignore[override]
        return self.owner.training

    def data(self) -> tuple[Any, ...]:
        return self.layers, self.through, self.opened_parts, self.steps

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name not in ("_chain", "_program", "_eval_program")
        }

    def bound_to(self, owner: nn.Module) -> Segment:
        segment = Segment(*self.data())
        segment.owner = owner
        return segment

    def label(self) -> str:
        first = ".".join(self.layers[0].conv)
        whole = not self.steps
        return type(self.owner).__name__ if whole else f"{type(self.owner).__name__}, {first} and what follows"

    def opened(self) -> dict[nn.Module, list[str]]:
        return _found_in(self.owner, self.opened_parts)

    def parts(self) -> list[nn.Module]:
        paths = [path for path, _ in self.through]
        for layer in self.layers:
            paths += [path for path in layer[:3] if path]
        found = (find(self.owner, path) for path in paths)
        return list(dict.fromkeys((self.owner, *self.opened(), *(m for m in found if m is not None))))

    def layer_modules(self) -> list[nn.Module]:
        found = (find(self.owner, path) for layer in self.layers for path in layer[:2] if path)
        return [m for m in found if m is not None]

    def changed(self) -> str | None:
        """Why the layers are not those of the owner any more, or None."""
        for opened in self.opened_parts:
            reason = opened.reason(self.owner)
            if reason is not None:
                return reason
        for path, kind in self.through:
            module = find(self.owner, path)
            if type(module) is not kind:
                return f"a {type(module).__name__} where a {kind.__name__} was"
        if any(find(self.owner, path) is None for layer in self.layers for path in layer[:3] if path):
            return "a layer is gone"
        return None

    def cannot_run(self, x: Tensor, training: bool, autocast: torch.dtype | None) -> str | None:
        if autocast is not None and self.frozen:  # whose products with float32 buffers are float32
            return "a frozen batch norm under autocast"
        return super().cannot_run(x, training, autocast)

    def emit(self, builder: GraphBuilder, x: Any) -> Any:
        owner = self.owner
        if isinstance(builder, ChainRecorder):
            reason = self.changed()
            identities = [find(owner, path) for path, kind in self.through if kind is nn.Identity]
            frozen = [find(owner, layer.bn) for layer in self.layers if layer.bn and layer.frozen_eps is not None]
            builder.through([m for m in (*self.opened(), *identities, *frozen) if m is not None], reason)
            if reason is not None:
                return x
        values = [x]
        for conv, bn, relu, source, residual, frozen_eps in self.layers:
            norm: Any = None if bn is None else find(owner, bn)
            values.append(
                builder.conv(
                    find(owner, conv),
                    norm if frozen_eps is None else FrozenNorm(norm, frozen_eps),
                    values[source],
                    relu=None if relu is None else find(owner, relu) if relu else _RELU,
                    residual=None if residual is None else values[residual],
                )
            )
        return values[-1]


class Unplanned(str):
    """Why a module has no plan in a mode though nothing is missing: its original forward is to run."""

    __slots__ = ()


@dataclass(eq=False)
class Plan:
    """The forward of a module in one mode: ``steps`` around ``segments``, or one segment that is all of it."""

    segments: list[Segment]
    opened: list[ModuleGuard] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    inputs: int = 1
    count: int = 0
    result: Any = None
    _guard: StalenessGuard | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_guard": None}

    @property
    def whole(self) -> bool:
        return not self.steps

    def data(self) -> tuple[Any, ...]:
        segments = [segment.data() for segment in self.segments]
        return segments, self.opened, self.steps, self.inputs, self.count, self.result

    def bind(self, owner: nn.Module) -> None:
        for segment in self.segments:
            segment.owner = owner

    def bound_to(self, owner: nn.Module) -> Plan:
        segments = [s.bound_to(owner) for s in self.segments]
        return Plan(segments, self.opened, self.steps, self.inputs, self.count, self.result)

    def reason(self, owner: nn.Module) -> str | None:
        """Why the steps may not be those of the module any more, or None."""
        if torch.compiler.is_compiling():
            return self._changed(owner)
        if nn_module._has_any_global_hook():  # of modules whose code was read the calls are not made
            return "a global module hook"
        if self._guard is not None and self._guard.is_valid():
            return None
        reason = self._changed(owner) or patches.call_replaced()
        if reason is None:
            opened = self._opened_in(owner)
            self._guard = StalenessGuard(list(dict.fromkeys((owner, *opened))), opened, contents=False, kinds=False)
        return reason

    def _changed(self, owner: nn.Module) -> str | None:
        for opened in self.opened:
            reason = opened.reason(owner)
            if reason is not None:
                return reason
        inside = [m for m in self._opened_in(owner) if m is not owner]
        return hooks_reason([owner, *inside])

    def _opened_in(self, owner: nn.Module) -> dict[nn.Module, list[str]]:
        return _found_in(owner, self.opened)

    def outdated(self, owner: nn.Module) -> str | None:
        """Why the plan is none for the module as it is now, whatever its layers are set to; or None."""
        changed = (segment.changed() for segment in self.segments)
        return self._changed(owner) or next((reason for reason in changed if reason is not None), None)

    def mixed(self, owner: nn.Module) -> bool:
        """Whether some of the modules whose code was read are in another mode than ``owner``."""
        found = (find(owner, o.path) for o in self.opened or self.segments[0].opened_parts)
        return any(m is not None and m.training != owner.training for m in found)

    def run(self, owner: nn.Module, inputs: Sequence[Tensor]) -> Any:
        values: list[Any] = [*inputs, *[None] * (self.count - len(inputs))]
        for step in self.steps:
            if step.kind == "run":
                segment = self.segments[step.target]
                y = segment.fused(_filled(step.args[0], values))
                if y is None:
                    for part in segment.steps:
                        values[part.result] = _call(owner, part, values)
                else:
                    values[step.result] = y
            else:
                values[step.result] = _call(owner, step, values)
            for i in step.free:
                values[i] = None
        return _filled(self.result, values)


def _filled(arg: Any, values: list[Any]) -> Any:
    kind = type(arg)
    if kind is Ref:
        return values[arg.number]
    if kind is tuple or kind is list:
        return kind(_filled(a, values) for a in arg)
    if kind is dict:
        return {name: _filled(a, values) for name, a in arg.items()}
    if kind is slice:
        return slice(_filled(arg.start, values), _filled(arg.stop, values), _filled(arg.step, values))
    return arg


def _call(owner: nn.Module, step: Step, values: list[Any]) -> Any:
    if step.kind == "get_attr":
        *path, name = step.target
        return getattr(find(owner, tuple(path)), name)
    args = [_filled(a, values) for a in step.args]
    kwargs = {name: _filled(a, values) for name, a in step.kwargs.items()} if step.kwargs else {}
    if step.kind == "call_module":
        module = find(owner, step.target)
        assert module is not None  # Plan.reason asked
        return module(*args, **kwargs)
    if step.kind == "call_method":
        return getattr(args[0], step.target)(*args[1:], **kwargs)
    return step.target(*args, **kwargs)

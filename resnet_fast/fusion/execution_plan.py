"""What a converted module runs instead of its ``forward``: chains, and the steps around them.

:mod:`.partition` makes an :class:`ExecutionPlan`; the module's :class:`.convert.FusionState` runs it. Inputs go in,
what ``forward`` would return comes out. Each :class:`Segment` runs on the chain executor, or step by step where that
declines.

A plan is plain data: paths, classes, settings. It looks modules up at each run, so it goes with its module into copies
and pickles and sees replaced layers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..chain import patches
from ..chain.executor import ChainExecutor
from ..chain.frozen_norm import FrozenNorm
from ..chain.guard import StalenessGuard, hooks_reason
from ..chain.record import ChainRecorder, GraphBuilder
from .module_guard import ModuleGuard, Path, find, guarded_modules

__all__ = ["ExecutionPlan", "LayerPaths", "Ref", "Segment", "Step", "Unplanned"]

# A ReLU that forward calls as a function.
_RELU = nn.ReLU()
# Attributes by the names that pickles of earlier versions hold.
_EARLIER_NAMES = {"opened": "guards", "opened_parts": "guards", "through": "noops", "count": "slots"}


class LayerPaths(NamedTuple):
    """``[relu](bn(conv(source)) [+ residual])``; values are numbered as in a chain: 0 is the input."""

    conv: Path
    bn: Path | None
    relu: Path | None  # () for a function
    source: int
    residual: int | None
    frozen_eps: float | None = None  # of a frozen batch norm: resnet_fast.chain.frozen_norm


class Ref(NamedTuple):
    """The value in this slot of the run."""

    number: int


class _FunctionName(NamedTuple):
    """Stands for a function in a pickle."""

    module: str
    name: str


@dataclass
class Step:
    """One node of the graph: a call, or the run of a segment. ``result`` is the slot of its value."""

    kind: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: int
    free: tuple[int, ...] = ()  # slots that no later step reads

    def __getstate__(self) -> dict[str, Any]:
        """By module and name: pickle cannot find some of PyTorch's functions by their qualified name."""
        module, name = (getattr(self.target, key, None) for key in ("__module__", "__name__"))
        hidden = callable(self.target) and getattr(self.target, "__qualname__", name) != name
        if hidden and getattr(sys.modules.get(str(module)), str(name), None) is self.target:
            return {**self.__dict__, "target": _FunctionName(str(module), str(name))}
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.target, _FunctionName):
            self.target = getattr(import_module(self.target.module), self.target.name)


class Segment(ChainExecutor):
    """A chain of layers inside its owner.

    noops: modules between the layers that do nothing, as an identity does; steps: the layers as the graph had them,
    which run where the chain cannot, or none where the chain is all of the owner's forward.
    """

    owner: nn.Module

    def __init__(
        self,
        layers: list[LayerPaths],
        noops: list[tuple[Path, type[nn.Module]]],
        guards: list[ModuleGuard],
        steps: list[Step],
    ) -> None:
        self.layers, self.noops, self.guards, self.steps = layers, noops, guards, steps
        self.frozen = any(layer.frozen_eps is not None for layer in layers)

    @property
    def training(self) -> bool:  # type: ignore[override]
        return self.owner.training

    def data(self) -> tuple[Any, ...]:
        return self.layers, self.noops, self.guards, self.steps

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name not in ("_chain", "_program", "_eval_program")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({_EARLIER_NAMES.get(name, name): value for name, value in state.items()})

    def bound_to(self, owner: nn.Module) -> Segment:
        segment = Segment(*self.data())
        segment.owner = owner
        return segment

    def label(self) -> str:
        first = ".".join(self.layers[0].conv)
        whole = not self.steps
        return type(self.owner).__name__ if whole else f"{type(self.owner).__name__}, {first} and what follows"

    def opened(self) -> dict[nn.Module, list[str]]:
        return guarded_modules(self.owner, self.guards)

    def parts(self) -> list[nn.Module]:
        paths = [path for path, _ in self.noops]
        for layer in self.layers:
            paths += [path for path in layer[:3] if path]
        found = (find(self.owner, path) for path in paths)
        return list(dict.fromkeys((self.owner, *self.opened(), *(m for m in found if m is not None))))

    def layer_modules(self) -> list[nn.Module]:
        found = (find(self.owner, path) for layer in self.layers for path in layer[:2] if path)
        return [m for m in found if m is not None]

    def changed(self) -> str | None:
        """Why the layers are not those of the owner any more, or None."""
        for guard in self.guards:
            reason = guard.reason(self.owner)
            if reason is not None:
                return reason
        for path, kind in self.noops:
            module = find(self.owner, path)
            if type(module) is not kind:
                return f"a {type(module).__name__} where a {kind.__name__} was"
        if any(find(self.owner, path) is None for layer in self.layers for path in layer[:3] if path):
            return "a layer is gone"
        return None

    def cannot_run(self, x: Tensor, training: bool, autocast: torch.dtype | None) -> str | None:
        if autocast is not None and self.frozen:  # its float32 buffers make the result float32
            return "a frozen batch norm under autocast"
        return super().cannot_run(x, training, autocast)

    def emit(self, builder: GraphBuilder, x: Any) -> Any:
        owner = self.owner
        if isinstance(builder, ChainRecorder):
            reason = self.changed()
            identities = [find(owner, path) for path, kind in self.noops if kind is nn.Identity]
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
    """Why a module has no plan in a mode by design: its original forward runs, and that counts as no fallback."""

    __slots__ = ()


@dataclass(eq=False)
class ExecutionPlan:
    """The forward of a module in one mode: ``steps`` around ``segments``, or one segment that is all of it.

    Values live in ``slots`` numbered slots, the first ``inputs`` for the arguments; ``result`` refers to them.
    """

    segments: list[Segment]
    guards: list[ModuleGuard] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    inputs: int = 1
    slots: int = 0
    result: Any = None
    _guard: StalenessGuard | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_guard": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({_EARLIER_NAMES.get(name, name): value for name, value in state.items()})

    @property
    def whole(self) -> bool:
        return not self.steps

    def data(self) -> tuple[Any, ...]:
        segments = [segment.data() for segment in self.segments]
        return segments, self.guards, self.steps, self.inputs, self.slots, self.result

    def bind(self, owner: nn.Module) -> None:
        for segment in self.segments:
            segment.owner = owner

    def bound_to(self, owner: nn.Module) -> ExecutionPlan:
        segments = [s.bound_to(owner) for s in self.segments]
        return ExecutionPlan(segments, self.guards, self.steps, self.inputs, self.slots, self.result)

    def stale_reason(self, owner: nn.Module) -> str | None:
        """Why the steps may not be those of the module any more, or None."""
        if torch.compiler.is_compiling():
            return self._guards_reason(owner)
        if nn_module._has_any_global_hook():  # the plan does not call the modules whose code was read
            return "a global module hook"
        if self._guard is not None and self._guard.is_valid():
            return None
        reason = self._guards_reason(owner) or patches.call_replaced()
        if reason is None:
            guarded = guarded_modules(owner, self.guards)
            self._guard = StalenessGuard(list(dict.fromkeys((owner, *guarded))), guarded, contents=False, kinds=False)
        return reason

    def _guards_reason(self, owner: nn.Module) -> str | None:
        for guard in self.guards:
            reason = guard.reason(owner)
            if reason is not None:
                return reason
        inside = [m for m in guarded_modules(owner, self.guards) if m is not owner]
        return hooks_reason([owner, *inside])

    def outdated_reason(self, owner: nn.Module) -> str | None:
        """Why ``fuse`` would make another plan for the module as it is now, whatever its layers are set to; or None."""
        changed = (segment.changed() for segment in self.segments)
        return self._guards_reason(owner) or next((reason for reason in changed if reason is not None), None)

    def modes_differ(self, owner: nn.Module) -> bool:
        """Whether a module whose code was read is in another mode than ``owner``."""
        found = (find(owner, guard.path) for guard in self.guards or self.segments[0].guards)
        return any(m is not None and m.training != owner.training for m in found)

    def run(self, owner: nn.Module, inputs: Sequence[Tensor]) -> Any:
        values: list[Any] = [*inputs, *[None] * (self.slots - len(inputs))]
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
    """``arg`` with values in the place of references."""
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
        assert module is not None  # stale_reason has looked it up
        return module(*args, **kwargs)
    if step.kind == "call_method":
        return getattr(args[0], step.target)(*args[1:], **kwargs)
    return step.target(*args, **kwargs)

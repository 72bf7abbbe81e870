"""``fuse``: the fused operators in networks that people already have; ``unfuse``: and back."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import backends
from ..chain import patches
from ..chain.guard import touched
from ..chain.plain import as_plain
from .plan import Plan, Unplanned, original

__all__ = ["ConvertedModule", "FusionState", "check_model", "fuse", "fused_class", "unfuse"]


class FusionState:
    """What a fused module carries: its plan for each mode, or the reason why it has none."""

    def __init__(self, owner: nn.Module, plans: dict[bool, Plan | str]) -> None:
        self.owner, self.plans = owner, plans
        self.variants: dict[tuple[str, ...], FusionState] = {}
        for own in self.each():
            own.bind(owner)
        # Where both modes do the same, it does not matter in which mode a part is.
        plan, training = plans[False], plans[True]
        self.same = plan is training
        self.one = plan.segments[0] if self.same and isinstance(plan, Plan) and plan.whole else None

    @classmethod
    def of(cls, owner: ConvertedModule) -> FusionState | None:
        """The owner's; made now for a shallow copy, which came with that of another module."""
        fusion = owner._resnet_fast
        if fusion is not None and fusion.owner is not owner:
            bound = {id(plan): plan.bound_to(owner) for plan in fusion.each()}
            fusion = FusionState(owner, {mode: bound.get(id(plan), plan) for mode, plan in fusion.plans.items()})
            owner.__dict__["_resnet_fast"] = fusion
        return fusion

    def plan_for(self, training: bool) -> Plan | str:
        plan = self.plans[training]
        if isinstance(plan, Plan) and not self.same and plan.mixed(self.owner):
            return "parts of it are in another mode"
        return plan

    def each(self) -> list[Plan]:
        return list({id(p): p for p in self.plans.values() if isinstance(p, Plan)}.values())

    def variant(self, given: tuple[str, ...]) -> FusionState:
        """For calls with tensors as these arguments, which have a default: found at the first such call."""
        if not given:
            return self
        if given not in self.variants:
            from .partition import GraphPartitioner

            finding = GraphPartitioner(self.owner, given).findings[self.owner]
            reason = finding.refused or f"nothing to fuse in calls with {', '.join(given)}"
            self.variants[given] = FusionState(
                self.owner, finding.plans if finding.fuses else {False: reason, True: reason}
            )
        return self.variants[given]

    def outdated(self) -> bool:
        """Whether the owner has changed so that a plan is not its own any more."""
        return any(plan.outdated(self.owner) is not None for plan in self.each())

    def forget(self) -> None:
        for plan in self.each():
            for segment in plan.segments:
                segment._chain = segment._program = segment._eval_program = None
        for variant in self.variants.values():
            variant.forget()


class ConvertedModule(nn.Module):
    """Mixin of the classes that :func:`fuse` makes: runs the plan, or else the forward of the class behind it."""

    fused_from: ClassVar[type[nn.Module]]
    _resnet_fast: FusionState | None = None  # of one that its class has made, as slices are, not fuse

    def _fused_or_original(self, *args: Any, **kwargs: Any) -> Any:
        fusion = FusionState.of(self)
        plan = "made since by its class: fuse it" if fusion is None else fusion.plan_for(self.training)
        inputs: list[Any] | None = list(args)
        if isinstance(plan, Unplanned):
            return super().forward(*args, **kwargs)
        if kwargs or isinstance(plan, str) or len(args) != plan.inputs:
            if any(map(_is_symbol, (*args, *kwargs.values()))):
                return super().forward(*args, **kwargs)
            given, inputs = _inputs(self.fused_from.forward, self, args, kwargs)
            if given and fusion is not None:
                new = torch.compiler.is_compiling() and given not in fusion.variants
                plan = f"compiled, with {', '.join(given)}" if new else fusion.variant(given).plan_for(self.training)
        if isinstance(plan, Unplanned) or (inputs is not None and not all(isinstance(a, Tensor) for a in inputs)):
            return super().forward(*args, **kwargs)  # symbols of a tracer, lists: nothing was promised for them
        if isinstance(plan, str):
            reason = plan
        elif inputs is None:
            reason = "called with other arguments than it was traced with"
        elif plan.whole:
            y = plan.segments[0].fused(inputs[0])
            return super().forward(*args, **kwargs) if y is None else y
        else:
            changed = plan.reason(self)
            if changed is None:
                return plan.run(self, inputs)
            reason = changed
        backends.decline(type(self).__name__, reason)
        return super().forward(*args, **kwargs)

    def train(self, mode: bool = True) -> ConvertedModule:
        if mode != self.training and self._resnet_fast is not None:
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
        """By the class behind, as there is no name to find this one by."""
        reduced: Any = super().__reduce_ex__(protocol)
        function, args, *rest = reduced
        if type(self) not in args:
            return (function, args, *rest)
        place = args.index(type(self))
        return (_again, (self.fused_from, function, args[:place], args[place + 1 :]), *rest)


def _is_symbol(value: Any) -> bool:
    """What ``torch.fx`` traces with."""
    return not isinstance(value, Tensor) and hasattr(type(value), "__torch_function__")


def _inputs(forward: Any, module: nn.Module, args: Any, kwargs: Any) -> tuple[tuple[str, ...], list[Any] | None]:
    """The arguments without a default and the tensors that were given in the place of None, if all others are left at
    their defaults; and the names of these tensors."""
    signature = inspect.signature(forward)
    try:
        given = signature.bind(module, *args, **kwargs).arguments
    except TypeError:  # which the forward itself will raise
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


def _again(kind: type[nn.Module], function: Any, before: Any, after: Any) -> Any:
    return function(*before, fused_class(kind), *after)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def fused_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``kind`` that runs plans, the same at every call: ``forward`` has the signature of the original."""
    if kind in _classes:
        return _classes[kind]

    @functools.wraps(kind.forward)
    def forward(self: ConvertedModule, *args: Any, **kwargs: Any) -> Any:
        fusion = self._resnet_fast
        if fusion is not None and fusion.owner is not self:
            fusion = FusionState.of(self)
        # Most calls: a module that is one chain in both modes, and the tensor that it wants.
        one = None if fusion is None else fusion.one
        if one is not None and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            y = one.fused(args[0])
            return kind.forward(self, *args) if y is None else y
        return self._fused_or_original(*args, **kwargs)

    names = {"fused_from": kind, "forward": forward, "__doc__": kind.__doc__, "__module__": __name__}
    _classes[kind] = type(f"Fused{kind.__name__}", (ConvertedModule, kind), names)
    patches.register(_classes[kind], alone=True)  # what is behind it may be another at the next fuse
    return _classes[kind]


def check_model(model: Any) -> None:
    """Raises TypeError for what is not a module that can be looked into."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, want a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a ScriptModule, whose code is compiled already: fuse the model before it is scripted")


def fuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """``model`` with convolution, batch norm, ReLU and residual add fused wherever its code computes that.

    Equivalent to ``model``: the results are those of ``model(x)`` but for rounding, and so are the gradients. They are
    laid out as those of ``model``: a dropout draws the same mask from the same seed, and ``view`` works where it does.

    Each module's own ``forward`` is traced; where it is ``conv -> batch norm [-> + residual] [-> ReLU]``, once or in
    a chain with one input and one result (a residual block, a ``Sequential`` of blocks, the stem inside a larger
    forward), the module gets a subclass of its class that runs the chain as one operator. Nothing else changes:
    parameters, buffers, names, ``state_dict``, flags and hooks are the same objects. What was found at ``fuse`` is
    watched: after replaced layers, new hooks, changed attributes, the original forward runs, and
    :func:`resnet_fast.backends.fallbacks` says why. What does not match stays as it is: :func:`report` says why.

    Args:
        model: any network; on any device, in any mode. Modules that are fused already stay as they are; where they have
            other children or other code since, they are fused as they are now.
        inplace: fuse ``model`` itself, not a deep copy of it.

    Returns:
        The fused network.

    Raises:
        TypeError: ``model`` is not a module, or compiled by TorchScript.
    """
    from .partition import GraphPartitioner  # with what traces: not needed where nothing is fused

    check_model(model)
    model = model if inplace else copy.deepcopy(model)
    for module, finding in GraphPartitioner(model).findings.items():
        fusion = FusionState.of(module) if isinstance(module, ConvertedModule) else None
        if finding.fuses and (fusion is None or fusion.outdated()):
            module.__dict__["_resnet_fast"] = FusionState(module, finding.plans)
            module.__class__ = fused_class(original(module))
    return model


def unfuse(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """``model`` as it was before :func:`fuse`: every module has its own class again.

    Args:
        model: a network; what :func:`fuse` did not touch stays as it is.
        inplace: change ``model`` itself, not a deep copy of it.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, want a torch.nn.Module")
    model = model if inplace else copy.deepcopy(model)
    for module in list(model.modules()):
        if isinstance(module, ConvertedModule):
            module.__dict__.pop("_resnet_fast", None)
            module.__class__ = original(module)  # type: ignore[assignment]
    return model

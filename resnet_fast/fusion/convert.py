"""``fuse``: gives the modules of any network plans that run its chains as fused operators; ``unfuse`` takes them back.

:class:`.partition.GraphPartitioner` finds the plans. Each module that has one gets a class of :mod:`.converted_module`
and a :class:`FusionState`, which chooses and runs the plan at each call.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .. import backends
from .converted_module import ConvertedModule, are_tensors, fused_class, has_proxies, tensor_inputs
from .execution_plan import ExecutionPlan, Unplanned
from .module_guard import original

__all__ = ["FusionState", "check_model", "fuse", "unfuse"]


class FusionState:
    """What a converted module carries: its plan for each mode, or the reason why it has none.

    variants: the state for calls that give tensors to these arguments, which have a default of None. one: the segment
    of a module that is one chain, the same in both modes.
    """

    def __init__(self, owner: nn.Module, plans: dict[bool, ExecutionPlan | str]) -> None:
        self.owner, self.plans = owner, plans
        self.variants: dict[tuple[str, ...], FusionState] = {}
        for own in self.each_plan():
            own.bind(owner)
        # With one plan for both modes, the modes of the modules inside do not matter.
        plan, training = plans[False], plans[True]
        self.same = plan is training
        self.one = plan.segments[0] if self.same and isinstance(plan, ExecutionPlan) and plan.whole else None

    @classmethod
    def of(cls, owner: ConvertedModule) -> FusionState | None:
        """The owner's, if ``fuse`` has seen it; made now for a shallow copy, which shares that of its original."""
        state = owner._resnet_fast
        if not isinstance(state, FusionState):
            return None
        if state.owner is not owner:
            bound = {id(plan): plan.bound_to(owner) for plan in state.each_plan()}
            state = FusionState(owner, {mode: bound.get(id(plan), plan) for mode, plan in state.plans.items()})
            owner.__dict__["_resnet_fast"] = state
        return state

    def run(self, module: ConvertedModule, args: Any, kwargs: Any) -> Any:
        """``module(*args, **kwargs)``, by a plan or by the forward of the class behind."""
        forward = module.fused_from.forward
        plan = self._plan(module.training)
        inputs: list[Any] | None = list(args)
        if not isinstance(plan, Unplanned) and (kwargs or isinstance(plan, str) or len(args) != plan.inputs):
            if has_proxies(args, kwargs):
                return forward(module, *args, **kwargs)
            given, inputs = tensor_inputs(forward, module, args, kwargs)
            if given:
                new = torch.compiler.is_compiling() and given not in self.variants
                plan = f"compiled, with {', '.join(given)}" if new else self._variant(given)._plan(module.training)
        if isinstance(plan, Unplanned) or not are_tensors(inputs):
            return forward(module, *args, **kwargs)  # lists, a tracer's proxies: no plan was promised for them
        if isinstance(plan, str):
            reason = plan
        elif inputs is None:
            reason = "called with other arguments than it was traced with"
        elif plan.whole:
            y = plan.segments[0].fused(inputs[0])
            return forward(module, *args, **kwargs) if y is None else y
        else:
            stale = plan.stale_reason(module)
            if stale is None:
                return plan.run(module, inputs)
            reason = stale
        backends.decline(type(module).__name__, reason)
        return forward(module, *args, **kwargs)

    def _plan(self, training: bool) -> ExecutionPlan | str:
        plan = self.plans[training]
        if isinstance(plan, ExecutionPlan) and not self.same and plan.modes_differ(self.owner):
            return "parts of it are in another mode"
        return plan

    def each_plan(self) -> list[ExecutionPlan]:
        return list({id(p): p for p in self.plans.values() if isinstance(p, ExecutionPlan)}.values())

    def _variant(self, given: tuple[str, ...]) -> FusionState:
        """For calls that give tensors to these arguments: partitioned at the first such call."""
        if given not in self.variants:
            from .partition import GraphPartitioner

            result = GraphPartitioner(self.owner, given).results[self.owner]
            reason = result.refused or f"nothing to fuse in calls with {', '.join(given)}"
            self.variants[given] = FusionState(
                self.owner, result.plans if result.fuses else {False: reason, True: reason}
            )
        return self.variants[given]

    def outdated(self) -> bool:
        """Whether the owner has changed so that ``fuse`` would make other plans."""
        return any(plan.outdated_reason(self.owner) is not None for plan in self.each_plan())

    def forget(self) -> None:
        """Lets packed weights go."""
        for plan in self.each_plan():
            for segment in plan.segments:
                segment._chain = segment._program = segment._eval_program = None
        for variant in self.variants.values():
            variant.forget()


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
    from .partition import GraphPartitioner  # imports the tracer, which few programs need

    check_model(model)
    model = model if inplace else copy.deepcopy(model)
    for module, result in GraphPartitioner(model).results.items():
        state = FusionState.of(module) if isinstance(module, ConvertedModule) else None
        if result.fuses and (state is None or state.outdated()):
            module.__dict__["_resnet_fast"] = FusionState(module, result.plans)
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

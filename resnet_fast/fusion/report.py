"""What :func:`resnet_fast.fuse` did to a network, or would do.

A network, fused or not, goes in; out comes a :class:`Report` with a row for each fused module, and for each module and
convolution that is not fused, with the reason. :class:`.partition.GraphPartitioner` finds what is not fused yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..chain.executor import FusedModule
from ..chain.record import ChainRecorder, structure_reason
from .convert import FusionState, check_model
from .converted_module import ConvertedModule
from .execution_plan import ExecutionPlan
from .module_guard import original

if TYPE_CHECKING:
    from .partition import GraphPartitioner, PartitionResult

__all__ = ["Report", "Row", "report"]


@dataclass(frozen=True)
class Row:
    """``status``: ``"fused"``, ``"could be fused"`` or ``"not fused"``; ``layers`` counts convolutions."""

    name: str
    module: str  # the class
    status: str
    layers: int
    detail: str


@dataclass(frozen=True)
class Report:
    """What :func:`report` found; prints as a table."""

    rows: list[Row]
    fused: int  # convolutions in fused modules
    layers: int  # convolutions

    def __str__(self) -> str:
        header = Row("module", "class", "", 0, "")
        cells = [(r.name or "(model)", r.module, r.status, r.detail) for r in (header, *self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(3)]
        lines = ["  ".join((*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3])) for line in cells]
        total = f"{self.fused} of {self.layers} convolutions fused"
        return "\n".join(line.rstrip() for line in (*lines, total))


def report(model: nn.Module) -> Report:
    """What is fused in ``model``, what is not, and why.

    Of fused modules the outermost are named: those inside run by themselves only where the outer one cannot, which
    :func:`resnet_fast.backends.fallbacks` shows.

    Args:
        model: a network, fused or not; of one that is not, the report says what could be.

    Returns:
        An object that prints as a table; ``.rows`` has one :class:`Row` each for fused modules, for modules that do
        more than what is fused in them, and for convolutions that are not fused.

    Raises:
        TypeError: ``model`` is not a module, or compiled by TorchScript.
    """
    from .partition import GraphPartitioner  # imports the tracer, which few programs need

    check_model(model)
    return _Reporter(model, GraphPartitioner(model)).report()


class _Reporter:
    """Collects the rows. covered: convolutions and modules in a row already, by status; reasons: why others are not."""

    def __init__(self, model: nn.Module, partitioner: GraphPartitioner) -> None:
        self.partitioner = partitioner
        self.names = {module: name for name, module in model.named_modules()}
        self.rows: list[Row] = []
        self.covered: dict[nn.Module, str] = {}
        self.reasons: dict[nn.Module, str] = {}

    def report(self) -> Report:
        results = [(module, self.partitioner.results.get(module)) for module in self.names]
        for module, result in results:
            if isinstance(module, FusedModule):
                self._add_fused_module(module)
            else:
                self._add_planned(module, result)
        for module, result in results:
            if result is not None:
                self._add_refused(module, result)
        convolutions = [m for m in self.names if not list(m.children()) and type(m).__name__.endswith("Conv2d")]
        for conv in convolutions:
            if conv not in self.covered:
                self._add(conv, "not fused", 1, self._reason(conv))
        fused = sum(self.covered.get(conv) == "fused" for conv in convolutions)
        order = {name: i for i, name in enumerate(self.names.values())}
        return Report(sorted(self.rows, key=lambda r: order[r.name]), fused, len(convolutions))

    def _add(self, module: nn.Module, status: str, layers: int, detail: str) -> None:
        self.rows.append(Row(self.names[module], original(module).__name__, status, layers, detail))

    def _add_fused_module(self, module: FusedModule) -> None:
        """One that states its dataflow itself."""
        recorder = ChainRecorder(structure=True)
        module.emit(recorder, 0)
        parts = module.parts()
        reason = recorder.reason(parts)
        if reason is None:
            self._add_covering(module, "fused", parts, len(recorder.pairs), [])
            return
        self._add(module, "not fused", 0, reason)
        for conv in parts:
            if isinstance(conv, nn.Conv2d):
                part = f"part of a {original(module).__name__} that is not fused"
                self.reasons[conv] = structure_reason(conv, None) or part

    def _add_planned(self, module: nn.Module, result: PartitionResult | None) -> None:
        """One that ``fuse`` has converted, or would convert."""
        state = FusionState.of(module) if isinstance(module, ConvertedModule) else None
        if state is not None and not state.outdated():
            plans, status = state.plans, "fused"
        elif result is not None and result.fuses:
            plans, status = result.plans, "could be fused"
            for plan in plans.values():
                if isinstance(plan, ExecutionPlan):
                    plan.bind(module)
        else:
            return
        details = []
        plan = next(plan for plan in plans.values() if isinstance(plan, ExecutionPlan))
        if len(plan.segments) > 1:
            details.append(f"in {len(plan.segments)} chains")
        if result is not None and result.leftover is not None and not plan.whole:
            details.append(result.leftover)
        for training, other in plans.items():
            if isinstance(other, str):
                details.append(f"not in {'training' if training else 'eval'} mode: {other}")
        parts = [part for segment in plan.segments for part in segment.layer_modules()]
        self._add_covering(module, status, parts, sum(len(segment.layers) for segment in plan.segments), details)

    def _add_covering(
        self, module: nn.Module, status: str, parts: list[nn.Module], layers: int, details: list[str]
    ) -> None:
        """Unless an outer module covers all of its convolutions."""
        new = [part for part in parts if part not in self.covered]
        if any(isinstance(part, nn.Conv2d) for part in new):
            self.covered.update(dict.fromkeys((*new, module), status))
            count = f"{layers} convolution{'s' * (layers != 1)}"
            self._add(module, status, layers, ", ".join([count, *details]))

    def _add_refused(self, module: nn.Module, result: PartitionResult) -> None:
        for conv, why in result.reasons.items():
            self.reasons.setdefault(conv, why)
        if result.refused is not None:
            self._add(module, "not fused", 0, result.refused)
        elif result.leftover is not None and not result.whole and module not in self.covered:
            self._add(module, "not fused as a whole", 0, result.leftover)

    def _reason(self, conv: nn.Module) -> str:
        """Why no row covers the convolution."""
        if conv in self.reasons:
            return self.reasons[conv]
        if not isinstance(conv, nn.Conv2d):
            return "not an nn.Conv2d"
        if conv in self.partitioner.barred:
            return self.partitioner.barred[conv]
        path = self.names[conv]
        outer = (m for m, name in self.names.items() if path.startswith(f"{name}.") or not name)
        results = (self.partitioner.results.get(m) for m in outer)
        refused = [r.refused for r in results if r is not None and r.refused is not None]
        return refused[-1] if refused else "not called by the forward that was traced"

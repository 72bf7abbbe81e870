"""What :func:`resnet_fast.fuse` did to a network, or would do: one row for each module or layer that matters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..chain.executor import FusedModule
from ..chain.record import ChainRecorder, structure_reason
from .convert import ConvertedModule, FusionState, check_model
from .plan import Plan, original

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
    from .partition import GraphPartitioner  # with what traces: not needed where nothing is fused

    check_model(model)
    survey = GraphPartitioner(model)
    names = {module: name for name, module in model.named_modules()}
    convolutions = [m for m in names if not list(m.children()) and type(m).__name__.endswith("Conv2d")]
    rows: list[Row] = []
    covered: dict[nn.Module, str] = {}
    reasons: dict[nn.Module, str] = {}
    for module, name in names.items():
        _add_fused(module, name, survey.findings.get(module), rows, covered, reasons)
    for module, name in names.items():
        finding = survey.findings.get(module)
        if finding is None:
            continue
        for conv, why in finding.reasons.items():
            reasons.setdefault(conv, why)
        kind = original(module).__name__
        if finding.refused is not None:
            rows.append(Row(name, kind, "not fused", 0, finding.refused))
        elif finding.leftover is not None and not finding.whole and module not in covered:
            rows.append(Row(name, kind, "not fused as a whole", 0, finding.leftover))
    for conv in convolutions:
        if conv not in covered:
            rows.append(Row(names[conv], type(conv).__name__, "not fused", 1, _reason(conv, reasons, names, survey)))
    fused = sum(covered.get(conv) == "fused" for conv in convolutions)
    order = {name: i for i, name in enumerate(names.values())}
    return Report(sorted(rows, key=lambda r: order[r.name]), fused, len(convolutions))


def _add_fused(
    module: nn.Module,
    name: str,
    finding: PartitionResult | None,
    rows: list[Row],
    covered: dict[nn.Module, str],
    reasons: dict[nn.Module, str],
) -> None:
    if isinstance(module, FusedModule):
        recorder = ChainRecorder(structure=True)
        module.emit(recorder, 0)
        inside, status, plans = module.parts(), "fused", {}
        reason = recorder.reason(inside)
        if reason is not None:
            kind = original(module).__name__
            rows.append(Row(name, kind, "not fused", 0, reason))
            for conv in inside:
                if isinstance(conv, nn.Conv2d):
                    reasons[conv] = structure_reason(conv, None) or f"part of a {kind} that is not fused"
            return
        count = len(recorder.pairs)
    elif (
        isinstance(module, ConvertedModule) and (fusion := FusionState.of(module)) is not None and not fusion.outdated()
    ):
        plans, status = fusion.plans, "fused"
    elif finding is not None and finding.fuses:
        plans, status = finding.plans, "could be fused"
        for plan in plans.values():
            if isinstance(plan, Plan):
                plan.bind(module)
    else:
        return
    details = []
    if not isinstance(module, FusedModule):
        plan = next(plan for plan in plans.values() if isinstance(plan, Plan))
        inside = [part for segment in plan.segments for part in segment.layer_modules()]
        count = sum(len(segment.layers) for segment in plan.segments)
        if len(plan.segments) > 1:
            details.append(f"in {len(plan.segments)} chains")
        if finding is not None and finding.leftover is not None and not plan.whole:
            details.append(finding.leftover)
        for training, other in plans.items():
            if isinstance(other, str):
                details.append(f"not in {'training' if training else 'eval'} mode: {other}")
    new = [part for part in inside if part not in covered]
    if not any(isinstance(part, nn.Conv2d) for part in new):
        return
    covered.update(dict.fromkeys((*new, module), status))
    details.insert(0, f"{count} convolution{'s' * (count != 1)}")
    rows.append(Row(name, original(module).__name__, status, count, ", ".join(details)))


def _reason(
    conv: nn.Module, reasons: dict[nn.Module, str], names: dict[nn.Module, str], survey: GraphPartitioner
) -> str:
    if conv in reasons:
        return reasons[conv]
    if not isinstance(conv, nn.Conv2d):
        return "not an nn.Conv2d"
    if conv in survey.barred:
        return survey.barred[conv]
    above = (m for m, name in names.items() if names[conv].startswith(f"{name}.") or not name)
    refused = [f.refused for m in above if (f := survey.findings.get(m)) is not None and f.refused is not None]
    return refused[-1] if refused else "not called by the forward that was traced"

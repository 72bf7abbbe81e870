"""Which modules of a network can be fused, wholly or in part, and why not the others: found from what they compute."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ..chain.executor import FusedModule
from ..chain.guard import hooks_reason
from .convert import fused_class
from .pattern import ALONE, Match, Run, match, what
from .plan import LayerPaths, ModuleGuard, Path, Plan, Ref, Segment, Step, Unplanned, find, original
from .purity import Purity, purity
from .trace import RefusedError, Trace, follow, is_foreign

__all__ = ["GraphPartitioner", "PartitionResult"]

_NOTHING = "nothing to fuse in this mode"
_ATTEMPTS = 64  # at a trace; after each, one more module is not looked into


@dataclass
class PartitionResult:
    """What came out for one module: a plan for each mode, or why there is none."""

    plans: dict[bool, Plan | str] = field(default_factory=dict)
    layers: int = 0
    whole: bool = False
    residual: bool = False
    refused: str | None = None  # it could not be traced
    leftover: str | None = None  # its own code does more with a layer's result than the pattern
    reasons: dict[nn.Module, str] = field(default_factory=dict)  # of convolutions outside of runs

    @property
    def fuses(self) -> bool:
        return any(isinstance(plan, Plan) for plan in self.plans.values())


class GraphPartitioner:
    """Studies every module of ``model`` that has convolutions below it; ``findings`` has them, the outer ones last.

    given: arguments of the model's own forward that are tensors though they have a default.
    """

    def __init__(self, model: nn.Module, given: tuple[str, ...] = ()) -> None:
        self.model, self.given = model, given
        self.covered = {part for m in model.modules() if isinstance(m, FusedModule) for part in m.parts()}
        self.barred = self._barred()
        self.findings: dict[nn.Module, PartitionResult] = {}
        self._purities: dict[tuple[nn.Module, bool], Purity] = {}
        self._study_below(model)

    def _barred(self) -> dict[nn.Module, str]:
        """Layers that are left alone, whatever is around them."""
        parents: dict[nn.Module, int] = {}
        for parent in self.model.modules():
            for child in parent._modules.values():
                if child is not None:
                    parents[child] = parents.get(child, 0) + 1
        barred: dict[nn.Module, str] = {}
        for m, count in parents.items():
            if count > 1 and isinstance(m, (nn.Conv2d, nn.modules.batchnorm._BatchNorm)):
                barred[m] = "shared with another module"
            reason = hooks_reason([self.model, m])
            if reason is not None and not list(m.children()):
                barred[m] = reason
        return barred

    def _is_leaf(self, module: nn.Module, training: bool) -> bool:
        """What no trace looks into: layers of PyTorch, wrappers, what is fused by its author, modules with hooks."""
        return (
            is_foreign(module) is not None
            or isinstance(module, FusedModule)
            or self._purity(module, training).reason is not None
            or hooks_reason([self.model, module]) is not None
        )

    def _purity(self, module: nn.Module, training: bool) -> Purity:
        key = module, training
        if key not in self._purities:
            self._purities[key] = purity(module, training)
        return self._purities[key]

    def _study_below(self, module: nn.Module) -> None:
        for child in module._modules.values():
            if child is not None and child not in self.findings:
                self._study_below(child)
        if module in self.findings or module in self.covered:
            return
        if any(isinstance(m, nn.Conv2d) for m in module.modules()) and not isinstance(module, nn.Conv2d):
            self.findings[module] = self._study(module)

    def _study(self, module: nn.Module) -> PartitionResult:
        finding = PartitionResult()
        foreign = is_foreign(module) or _closed_class(module)
        if foreign is not None:
            finding.refused = foreign
            return finding
        stage = any(
            (below := self.findings.get(child)) is not None and below.whole and self._has_blocks(child)
            for child in module.children()
        )
        found: dict[bool, tuple[Trace, Match] | str] = {}
        for training in (False, True):
            try:
                trace = self._trace(module, training, set())
                found[training] = trace, match(module, trace.graph, training, self.barred)
            except RefusedError as error:
                found[training] = str(error)
        seen = found[False]
        if isinstance(seen, str):
            finding.refused = seen
            return finding
        trace, matched = seen
        finding.reasons = {module.get_submodule(str(n.target)): why for n, why in matched.reasons.items()}
        finding.leftover = self._leftover(module, trace, matched)
        if not stage and any(not isinstance(f, str) and f[1].is_all(f[0].graph) for f in found.values()):
            self._take_whole(module, finding, found)
        else:
            self._take_parts(module, finding)
        for training, plan in finding.plans.items():
            other, at = finding.plans.get(not training), found[training]
            if plan == _NOTHING and isinstance(other, Plan) and not isinstance(at, str):
                finding.plans[training] = self._unplanned(module, other, at[1], training)
        return finding

    def _unplanned(self, module: nn.Module, other: Plan, matched: Match, training: bool) -> str:
        """Why there is no plan in this mode where the other mode has ``other``."""
        alone = {module.get_submodule(str(n.target)) for n, why in matched.reasons.items() if why is ALONE}
        inside: set[Any] = set()
        for m in module.modules():
            found = None if m is module or m not in self.findings else self.findings[m].plans.get(training)
            inside |= _convolutions(m, found) if isinstance(found, Plan) else set()
        wanted = _convolutions(module, other)
        if not wanted <= inside | alone:
            return _NOTHING
        return Unplanned("the modules inside of it are fused by themselves" if wanted & inside else ALONE)

    def _has_blocks(self, module: nn.Module) -> bool:
        """Whether it is a stage: stages are not run together, lest small filters wait for large ones."""
        below = (self.findings.get(child) for child in module.children())
        return any(f is not None and f.whole and f.residual for f in below)

    def _trace(self, module: nn.Module, training: bool, leaves: set[nn.Module]) -> Trace:
        reason = self._purity(module, training).reason
        if reason is not None:
            raise RefusedError(module, reason)
        leaves = set(leaves)
        for _ in range(_ATTEMPTS):
            try:
                given = self.given if module is self.model else ()
                trace = follow(module, training, lambda m: m in leaves or self._is_leaf(m, training), given)
                return self._with_what_is_asked(module, training, trace)
            except RefusedError as error:
                if error.module is module or error.module in leaves:
                    raise
                leaves.add(error.module)
        raise RefusedError(module, "too much of it cannot be traced")

    def _with_what_is_asked(self, module: nn.Module, training: bool, trace: Trace) -> Trace:
        """Modules of which the code asks for attributes count as read, by one of their paths."""
        paths = {m: path for path, m in module.named_modules()}
        for path in list(trace.opened):
            for asked, names in self._purity(module.get_submodule(path), training).asked.items():
                where = paths.get(asked)
                if where is not None and (where in trace.opened or names - asked._modules.keys()):
                    trace.asked.setdefault(where, set()).update(names)
        trace.opened.extend(path for path in trace.asked if path not in trace.opened)
        return trace

    def _leftover(self, module: nn.Module, trace: Trace, matched: Match) -> str | None:
        """What reads a layer's result though it is not in the pattern, if its code meets the layer's in ``module``."""
        if matched.leftover is None:
            return None
        node, value = matched.leftover
        layer, around = set(_around(trace, value, itself=True)), _around(trace, node, itself=True)
        if layer & set(around) - {""}:
            return None
        top = module._modules.get(around[-1])
        name = what(module, node) if top is None else f"{type(top).__name__} ({around[-1]})"
        return f"{name} is not part of the pattern"

    def _take_whole(
        self, module: nn.Module, finding: PartitionResult, found: dict[bool, tuple[Trace, Match] | str]
    ) -> None:
        for training, f in found.items():
            if isinstance(f, str):
                finding.plans[training] = f
            elif not f[1].is_all(f[0].graph):
                finding.plans[training] = self._parts_plan(module, training)
            else:
                trace, matched = f
                run = matched.runs[0]
                opened = [ModuleGuard(module, _path(name), trace.asked.get(name, ())) for name in trace.opened]
                segment = _segment(module, run, opened, list(matched.alias), [])
                finding.plans[training] = Plan([segment])
                finding.layers = len(run.layers)
                finding.residual = any(layer.add is not None for layer in run.layers)
        finding.whole = True
        _share(finding)

    def _take_parts(self, module: nn.Module, finding: PartitionResult) -> None:
        for training in (False, True):
            plan = finding.plans[training] = self._parts_plan(module, training)
            if isinstance(plan, Plan):
                finding.layers = sum(len(segment.layers) for segment in plan.segments)
        if not finding.fuses:
            finding.plans.clear()
        _share(finding)

    def _parts_plan(self, module: nn.Module, training: bool) -> Plan | str:
        """Runs that are spread over the module's children; those inside of one child are the child's own affair."""
        inner = {m for m, f in self.findings.items() if f.fuses and (f.layers > 1 or not f.whole)}
        try:
            trace = self._trace(module, training, inner)
            runs = match(module, trace.graph, training, self.barred).runs
            runs = [run for run in runs if self._is_spread(module, trace, run)]
            if not runs:
                return _NOTHING
            opened = {name for run in runs for n in (*run.nodes, *run.through) for name in _around(trace, n)}
            others = {m for name, m in module.named_modules() if name not in opened}
            trace = self._trace(module, training, others)
            return _plan(module, trace, match(module, trace.graph, training, self.barred).runs)
        except RefusedError as error:
            return str(error)

    def _is_spread(self, module: nn.Module, trace: Trace, run: Run) -> bool:
        common = set.intersection(*(set(_around(trace, n, itself=True)) for n in run.nodes)) - {""}
        below = (self.findings.get(module.get_submodule(name)) for name in common)
        return not any(f is not None and f.fuses for f in below)


def _closed_class(module: nn.Module) -> str | None:
    try:
        fused_class(original(module))
    except TypeError as error:
        return f"a class that cannot be extended: {error}"
    return None


def _convolutions(module: nn.Module, plan: Plan) -> set[Any]:
    return {find(module, layer.conv) for segment in plan.segments for layer in segment.layers}


def _share(finding: PartitionResult) -> None:
    """One plan for both modes, where they are the same: filters are packed once."""
    evaluation, training = finding.plans.get(False), finding.plans.get(True)
    if isinstance(evaluation, Plan) and isinstance(training, Plan) and evaluation.data() == training.data():
        finding.plans[True] = evaluation


def _path(name: str) -> Path:
    return tuple(name.split(".")) if name else ()


def _around(trace: Trace, node: fx.Node, itself: bool = False) -> list[str]:
    """The modules whose code runs for ``node``, the innermost first, and with ``itself`` the module that it calls."""
    name = str(node.target) if itself and node.op == "call_module" else trace.owners[node]
    names = [name]
    while "." in name:
        name = name.rpartition(".")[0]
        names.append(name)
    return names if itself else [*names, ""]


def _segment(
    module: nn.Module, run: Run, opened: list[ModuleGuard], through: list[fx.Node], steps: list[Step]
) -> Segment:
    number = {run.entry: 0, **{layer.value: i for i, layer in enumerate(run.layers, 1)}}
    layers = []
    for layer in run.layers:
        relu = None if layer.relu is None else _path(str(layer.relu.target)) if layer.relu.op == "call_module" else ()
        layers.append(
            LayerPaths(
                _path(str(layer.conv.target)),
                None if layer.norm is None else _path(layer.norm),
                relu,
                number[layer.source],
                None if layer.residual is None else number[layer.residual],
                layer.frozen_eps,
            )
        )
    paths = [_path(str(n.target)) for n in through if n.op == "call_module"]
    kinds = [(path, type(module.get_submodule(".".join(path)))) for path in dict.fromkeys(paths)]
    return Segment(layers, kinds, opened, steps)


def _plan(module: nn.Module, trace: Trace, runs: list[Run]) -> Plan:
    """Every node in its order; a run stands where its last node stood."""
    nodes = list(trace.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    number = {n: i for i, n in enumerate(inputs)}
    for n in nodes:
        number.setdefault(n, len(number))
    inside = {n: run for run in runs for n in run.nodes}
    for run in runs:
        # The last first: whether one is inside depends on those that read it.
        for n in sorted(run.through, key=number.__getitem__, reverse=True):
            if all(user in inside for user in n.users):
                inside[n] = run
    ends = {run.layers[-1].value: run for run in runs}
    last_reader: dict[fx.Node, fx.Node] = {}
    for n in nodes:
        at = inside[n].layers[-1].value if n in inside else n
        for a in (*n.all_input_nodes, *([ends[n].entry] if n in ends else [])):
            if a not in last_reader or number[last_reader[a]] < number[at]:
                last_reader[a] = at
    opened = [ModuleGuard(module, _path(name), trace.asked.get(name, ())) for name in trace.opened]
    plan = Plan([], opened, inputs=len(inputs), count=len(number))
    for n in nodes:
        free = tuple(number[a] for a, reader in last_reader.items() if reader is n and a is not n)
        if n.op == "output":
            plan.result = _refs(n.args[0], number)
        elif n in ends:
            run = ends[n]
            steps = [_step(m, number, ()) for m in nodes if inside.get(m) is run]
            plan.steps.append(Step("run", len(plan.segments), (Ref(number[run.entry]),), {}, number[n], free))
            plan.segments.append(_segment(module, run, _opened(trace, run, opened), run.through, steps))
        elif n.op != "placeholder" and n not in inside:
            plan.steps.append(_step(n, number, free))
    return plan


def _opened(trace: Trace, run: Run, opened: list[ModuleGuard]) -> list[ModuleGuard]:
    nodes = (*run.nodes, *run.through)
    names = {name for n in nodes for name in (*_around(trace, n), *_around(trace, n, itself=True))}
    return [o for o in opened if ".".join(o.path) in names]


def _step(n: fx.Node, number: dict[fx.Node, int], free: tuple[int, ...]) -> Step:
    target = _path(str(n.target)) if n.op in ("call_module", "get_attr") else n.target
    return Step(n.op, target, _refs(n.args, number), _refs(n.kwargs, number), number[n], free)


def _refs(arg: Any, number: dict[fx.Node, int]) -> Any:
    """``arg`` with numbers in the place of nodes, and plain containers in the place of the graph's own."""
    if isinstance(arg, fx.Node):
        return Ref(number[arg])
    if isinstance(arg, tuple):
        return tuple(_refs(a, number) for a in arg)
    if isinstance(arg, list):
        return [_refs(a, number) for a in arg]
    if isinstance(arg, dict):
        return {name: _refs(a, number) for name, a in arg.items()}
    if isinstance(arg, slice):
        return slice(_refs(arg.start, number), _refs(arg.stop, number), _refs(arg.step, number))
    return arg

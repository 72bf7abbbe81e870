"""Which modules of a network can be fused, wholly or in part, and why not the others.

:func:`.convert.fuse` and :func:`.report.report` hand a network in. :class:`GraphPartitioner` traces each module's
``forward`` (:mod:`.trace`), matches chains of layers in the graph (:mod:`.pattern`), and turns them into an
:class:`.execution_plan.ExecutionPlan` for each mode, in a :class:`PartitionResult` a module.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ..chain.executor import FusedModule
from ..chain.guard import hooks_reason
from .converted_module import fused_class
from .execution_plan import ExecutionPlan, LayerPaths, Ref, Segment, Step, Unplanned
from .module_guard import ModuleGuard, Path, find, original
from .pattern import ALONE, Match, MatchedChain, describe, match
from .purity import Purity, purity
from .trace import Trace, UntraceableError, is_foreign, trace_forward

__all__ = ["GraphPartitioner", "PartitionResult"]

_NOTHING = "nothing to fuse in this mode"
_MAX_TRACES = 64  # of one module; each failure makes one more module inside of it a leaf


@dataclass
class PartitionResult:
    """Of one module: a plan for each mode, or why there is none."""

    plans: dict[bool, ExecutionPlan | str] = field(default_factory=dict)
    layers: int = 0  # convolutions in the chains
    whole: bool = False  # one chain is all of it, in one mode at least
    residual: bool = False  # that chain has a residual add
    refused: str | None = None  # why it could not be traced
    leftover: str | None = None  # what its own code does with a layer's result beside the pattern
    reasons: dict[nn.Module, str] = field(default_factory=dict)  # of convolutions outside of chains

    @property
    def fuses(self) -> bool:
        return any(isinstance(plan, ExecutionPlan) for plan in self.plans.values())


class GraphPartitioner:
    """Partitions every module of ``model`` that has convolutions below it: see ``results``, the outer modules last.

    given: arguments of the model's own forward that are tensors though they have a default.
    """

    def __init__(self, model: nn.Module, given: tuple[str, ...] = ()) -> None:
        self.model, self.given = model, given
        self.covered = {part for m in model.modules() if isinstance(m, FusedModule) for part in m.parts()}
        self.barred = self._barred()
        self.results: dict[nn.Module, PartitionResult] = {}
        self._purities: dict[tuple[nn.Module, bool], Purity] = {}
        self._partition_below(model)

    def _barred(self) -> dict[nn.Module, str]:
        """Layers that no chain may take, and why."""
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
        """Whether no trace inlines it: PyTorch's layers, wrappers, ``FusedModule``, impure code, modules with hooks."""
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

    def _partition_below(self, module: nn.Module) -> None:
        for child in module._modules.values():
            if child is not None and child not in self.results:
                self._partition_below(child)
        if module in self.results or module in self.covered:
            return
        if any(isinstance(m, nn.Conv2d) for m in module.modules()) and not isinstance(module, nn.Conv2d):
            self.results[module] = self._partition(module)

    def _partition(self, module: nn.Module) -> PartitionResult:
        result = PartitionResult()
        foreign = is_foreign(module) or _closed_class(module)
        if foreign is not None:
            result.refused = foreign
            return result
        stage = any(
            (below := self.results.get(child)) is not None and below.whole and self._has_blocks(child)
            for child in module.children()
        )
        found: dict[bool, tuple[Trace, Match] | str] = {}
        for training in (False, True):
            try:
                trace = self._trace(module, training, set())
                found[training] = trace, match(module, trace.graph, training, self.barred)
            except UntraceableError as error:
                found[training] = str(error)
        seen = found[False]
        if isinstance(seen, str):
            result.refused = seen
            return result
        trace, matched = seen
        result.reasons = {module.get_submodule(str(n.target)): why for n, why in matched.reasons.items()}
        result.leftover = self._leftover(module, trace, matched)
        if not stage and any(not isinstance(f, str) and f[1].is_all(f[0].graph) for f in found.values()):
            self._take_whole(module, result, found)
        else:
            self._take_parts(module, result)
        for training, plan in result.plans.items():
            other, at = result.plans.get(not training), found[training]
            if plan == _NOTHING and isinstance(other, ExecutionPlan) and not isinstance(at, str):
                result.plans[training] = self._unplanned(module, other, at[1], training)
        return result

    def _unplanned(self, module: nn.Module, other: ExecutionPlan, matched: Match, training: bool) -> str:
        """Why there is no plan in this mode though the other mode has ``other``."""
        alone = {module.get_submodule(str(n.target)) for n, why in matched.reasons.items() if why is ALONE}
        inside: set[Any] = set()
        for m in module.modules():
            found = None if m is module or m not in self.results else self.results[m].plans.get(training)
            inside |= _convolutions(m, found) if isinstance(found, ExecutionPlan) else set()
        wanted = _convolutions(module, other)
        if not wanted <= inside | alone:
            return _NOTHING
        return Unplanned("the modules inside of it are fused by themselves" if wanted & inside else ALONE)

    def _has_blocks(self, module: nn.Module) -> bool:
        """Whether it is a stage. Stages run one by one, lest small filters wait for those of a later stage."""
        below = (self.results.get(child) for child in module.children())
        return any(f is not None and f.whole and f.residual for f in below)

    def _trace(self, module: nn.Module, training: bool, leaves: set[nn.Module]) -> Trace:
        reason = self._purity(module, training).reason
        if reason is not None:
            raise UntraceableError(module, reason)
        leaves = set(leaves)
        for _ in range(_MAX_TRACES):
            try:
                given = self.given if module is self.model else ()
                trace = trace_forward(module, training, lambda m: m in leaves or self._is_leaf(m, training), given)
                return self._with_asked_modules(module, training, trace)
            except UntraceableError as error:
                if error.module is module or error.module in leaves:
                    raise
                leaves.add(error.module)
        raise UntraceableError(module, "too much of it cannot be traced")

    def _with_asked_modules(self, module: nn.Module, training: bool, trace: Trace) -> Trace:
        """Modules whose attributes the code reads count as inlined, by one of their paths."""
        paths = {m: path for path, m in module.named_modules()}
        for path in list(trace.inlined):
            for asked, names in self._purity(module.get_submodule(path), training).asked.items():
                where = paths.get(asked)
                if where is not None and (where in trace.inlined or names - asked._modules.keys()):
                    trace.asked.setdefault(where, set()).update(names)
        trace.inlined.extend(path for path in trace.asked if path not in trace.inlined)
        return trace

    def _leftover(self, module: nn.Module, trace: Trace, matched: Match) -> str | None:
        """What reads a layer's result beside the pattern, if ``module`` is the innermost that has both."""
        if matched.leftover is None:
            return None
        node, value = matched.leftover
        layer, around = set(_around(trace, value, itself=True)), _around(trace, node, itself=True)
        if layer & set(around) - {""}:
            return None
        top = module._modules.get(around[-1])
        name = describe(module, node) if top is None else f"{type(top).__name__} ({around[-1]})"
        return f"{name} is not part of the pattern"

    def _take_whole(
        self, module: nn.Module, result: PartitionResult, found: dict[bool, tuple[Trace, Match] | str]
    ) -> None:
        for training, f in found.items():
            if isinstance(f, str):
                result.plans[training] = f
            elif not f[1].is_all(f[0].graph):
                result.plans[training] = self._parts_plan(module, training)
            else:
                trace, matched = f
                chain = matched.chains[0]
                guards = _guards(module, trace)
                segment = _segment(module, chain, guards, list(matched.alias), [])
                result.plans[training] = ExecutionPlan([segment])
                result.layers = len(chain.layers)
                result.residual = any(layer.add is not None for layer in chain.layers)
        result.whole = True
        _share(result)

    def _take_parts(self, module: nn.Module, result: PartitionResult) -> None:
        for training in (False, True):
            plan = result.plans[training] = self._parts_plan(module, training)
            if isinstance(plan, ExecutionPlan):
                result.layers = sum(len(segment.layers) for segment in plan.segments)
        if not result.fuses:
            result.plans.clear()
        _share(result)

    def _parts_plan(self, module: nn.Module, training: bool) -> ExecutionPlan | str:
        """A plan of the chains that spread over the module's children; those inside of one child are the child's."""
        inner = {m for m, f in self.results.items() if f.fuses and (f.layers > 1 or not f.whole)}
        try:
            trace = self._trace(module, training, inner)
            chains = match(module, trace.graph, training, self.barred).chains
            chains = [chain for chain in chains if self._is_spread(module, trace, chain)]
            if not chains:
                return _NOTHING
            inlined = {name for chain in chains for n in (*chain.nodes, *chain.noops) for name in _around(trace, n)}
            others = {m for name, m in module.named_modules() if name not in inlined}
            trace = self._trace(module, training, others)
            return _plan(module, trace, match(module, trace.graph, training, self.barred).chains)
        except UntraceableError as error:
            return str(error)

    def _is_spread(self, module: nn.Module, trace: Trace, chain: MatchedChain) -> bool:
        common = set.intersection(*(set(_around(trace, n, itself=True)) for n in chain.nodes)) - {""}
        below = (self.results.get(module.get_submodule(name)) for name in common)
        return not any(f is not None and f.fuses for f in below)


def _closed_class(module: nn.Module) -> str | None:
    try:
        fused_class(original(module))
    except TypeError as error:
        return f"a class that cannot be extended: {error}"
    return None


def _convolutions(module: nn.Module, plan: ExecutionPlan) -> set[Any]:
    return {find(module, layer.conv) for segment in plan.segments for layer in segment.layers}


def _share(result: PartitionResult) -> None:
    """Takes one plan for both modes where they are equal: filters are packed once."""
    evaluation, training = result.plans.get(False), result.plans.get(True)
    if (
        isinstance(evaluation, ExecutionPlan)
        and isinstance(training, ExecutionPlan)
        and evaluation.data() == training.data()
    ):
        result.plans[True] = evaluation


def _path(name: str) -> Path:
    return tuple(name.split(".")) if name else ()


def _around(trace: Trace, node: fx.Node, itself: bool = False) -> list[str]:
    """The modules whose code makes ``node``, the innermost first; with ``itself`` also the module that it calls."""
    name = str(node.target) if itself and node.op == "call_module" else trace.owners[node]
    names = [name]
    while "." in name:
        name = name.rpartition(".")[0]
        names.append(name)
    return names if itself else [*names, ""]


def _segment(
    module: nn.Module, chain: MatchedChain, guards: list[ModuleGuard], noops: list[fx.Node], steps: list[Step]
) -> Segment:
    number = {chain.entry: 0, **{layer.value: i for i, layer in enumerate(chain.layers, 1)}}
    layers = []
    for layer in chain.layers:
        relu = None if layer.relu is None else _path(str(layer.relu.target)) if layer.relu.op == "call_module" else ()
        layers.append(
            LayerPaths(
                _path(str(layer.conv.target)),
                None if layer.bn_path is None else _path(layer.bn_path),
                relu,
                number[layer.source],
                None if layer.residual is None else number[layer.residual],
                layer.frozen_eps,
            )
        )
    paths = [_path(str(n.target)) for n in noops if n.op == "call_module"]
    kinds = [(path, type(module.get_submodule(".".join(path)))) for path in dict.fromkeys(paths)]
    return Segment(layers, kinds, guards, steps)


def _plan(module: nn.Module, trace: Trace, chains: list[MatchedChain]) -> ExecutionPlan:
    """Every node in its order; a chain runs where its last node stood."""
    nodes = list(trace.graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    number = {n: i for i, n in enumerate(inputs)}
    for n in nodes:
        number.setdefault(n, len(number))
    inside = {n: chain for chain in chains for n in chain.nodes}
    for chain in chains:
        # From the last to the first: a node is inside if all that read it are.
        for n in sorted(chain.noops, key=number.__getitem__, reverse=True):
            if all(user in inside for user in n.users):
                inside[n] = chain
    ends = {chain.layers[-1].value: chain for chain in chains}
    last_reader: dict[fx.Node, fx.Node] = {}
    for n in nodes:
        at = inside[n].layers[-1].value if n in inside else n
        for a in (*n.all_input_nodes, *([ends[n].entry] if n in ends else [])):
            if a not in last_reader or number[last_reader[a]] < number[at]:
                last_reader[a] = at
    guards = _guards(module, trace)
    plan = ExecutionPlan([], guards, inputs=len(inputs), slots=len(number))
    for n in nodes:
        free = tuple(number[a] for a, reader in last_reader.items() if reader is n and a is not n)
        if n.op == "output":
            plan.result = _refs(n.args[0], number)
        elif n in ends:
            chain = ends[n]
            steps = [_step(m, number, ()) for m in nodes if inside.get(m) is chain]
            plan.steps.append(Step("run", len(plan.segments), (Ref(number[chain.entry]),), {}, number[n], free))
            plan.segments.append(_segment(module, chain, _guards_of(trace, chain, guards), chain.noops, steps))
        elif n.op != "placeholder" and n not in inside:
            plan.steps.append(_step(n, number, free))
    return plan


def _guards(module: nn.Module, trace: Trace) -> list[ModuleGuard]:
    return [ModuleGuard(module, _path(name), trace.asked.get(name, ())) for name in trace.inlined]


def _guards_of(trace: Trace, chain: MatchedChain, guards: list[ModuleGuard]) -> list[ModuleGuard]:
    nodes = (*chain.nodes, *chain.noops)
    names = {name for n in nodes for name in (*_around(trace, n), *_around(trace, n, itself=True))}
    return [guard for guard in guards if ".".join(guard.path) in names]


def _step(n: fx.Node, number: dict[fx.Node, int], free: tuple[int, ...]) -> Step:
    target = _path(str(n.target)) if n.op in ("call_module", "get_attr") else n.target
    return Step(n.op, target, _refs(n.args, number), _refs(n.kwargs, number), number[n], free)


def _refs(arg: Any, number: dict[fx.Node, int]) -> Any:
    """``arg`` with references in the place of nodes, and plain containers in the place of the graph's own."""
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

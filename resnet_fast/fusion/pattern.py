"""Finds the pattern in a traced graph: layers of convolution, batch norm, sum and ReLU, and chains of such layers.

A graph and the modules that it calls go in; a :class:`Match` comes out, with the longest chains that have one input and
one result, and the reason for each convolution outside of them. :mod:`.partition` and :mod:`resnet_fast.compiler` call
:func:`match`.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..chain.guard import DROPOUTS, NORMS
from ..chain.record import structure_reason
from .functional_batch_norm import find_functional_norms, vacuous_checks
from .trace import IN_PLACE

__all__ = ["ALONE", "Match", "MatchedChain", "MatchedLayer", "describe", "is_context", "match"]

# Forward and backward took 0.99 to 1.9 of PyTorch's time (docs/measurements/compiler-and-fuse.md): no neighbouring
# convolution is spared a pass over memory, and a 1x1 kernel has no Winograd algorithm.
ALONE = "a 1x1 convolution alone does not pay in training mode"

_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_RELU = {F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_"}
_DROP: dict[Any, float] = {F.dropout: 0.5, F.dropout1d: 0.5, F.dropout2d: 0.5, F.dropout3d: 0.5, F.alpha_dropout: 0.5}
_DROP |= {F.feature_alpha_dropout: 0.5}


@dataclass(eq=False)
class MatchedLayer:
    """``[relu](bn(conv(source)) [+ residual])``; ``value`` is the node that it ends with."""

    conv: fx.Node
    source: fx.Node
    value: fx.Node
    bn: fx.Node | None = None
    bn_path: str | None = None
    frozen_eps: float | None = None  # of a frozen batch norm: resnet_fast.chain.frozen_norm
    add: fx.Node | None = None
    residual: fx.Node | None = None
    relu: fx.Node | None = None
    aside: set[fx.Node] = field(default_factory=set)  # its other nodes, which nothing outside reads

    @property
    def nodes(self) -> set[fx.Node]:
        return {n for n in (self.conv, self.bn, self.add, self.relu) if n is not None} | self.aside

    @property
    def inputs(self) -> set[fx.Node]:
        return {n for n in (self.source, self.residual) if n is not None}


@dataclass
class MatchedChain:
    """Layers with one input, of which only the last one's result is used elsewhere."""

    entry: fx.Node
    layers: list[MatchedLayer]
    nodes: set[fx.Node]
    noops: list[fx.Node]  # identities and the like on the way from one layer to the next


@dataclass
class Match:
    """What a graph holds. reasons: why the convolutions outside of ``chains`` are in none; alias: for each node that
    does nothing, the one whose value it passes on."""

    chains: list[MatchedChain]
    reasons: dict[fx.Node, str]
    leftover: tuple[fx.Node, fx.Node] | None = None  # the first other node that reads a layer's result, and the result
    alias: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def is_all(self, graph: fx.Graph) -> bool:
        """Whether one chain is all that the graph does."""
        nodes = list(graph.nodes)
        result = nodes[-1].args[0]
        if len(self.chains) != 1 or not isinstance(result, fx.Node):
            return False
        chain = self.chains[0]
        inside = all(n in chain.nodes or n in self.alias or n.op in ("placeholder", "output") for n in nodes)
        one = sum(n.op == "placeholder" for n in nodes) == 1 and chain.entry.op == "placeholder"
        return inside and one and self.alias.get(result, result) is chain.layers[-1].value


def _module(root: nn.Module, node: fx.Node) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def describe(root: nn.Module, node: fx.Node) -> str:
    """A node in words."""
    module = _module(root, node)
    if module is not None:
        return f"{type(module).__name__} ({node.target})"
    if node.op == "output":
        return "the result"
    return str(getattr(node.target, "__name__", node.target))


def _is(node: fx.Node, names: Iterable[Any]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in names


def _does_nothing(node: fx.Node, module: nn.Module | None) -> bool:
    """An identity, or a dropout that its arguments turn off. Dropout modules are checked at every call."""
    if module is not None:
        return type(module) in (nn.Identity, *DROPOUTS)
    if not _is(node, _DROP):
        return False
    p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", _DROP[node.target])
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
    return bool(p == 0) or training is False


def _is_relu(node: fx.Node, module: nn.Module | None) -> bool:
    return type(module) is nn.ReLU if module is not None else _is(node, _RELU)


def is_context(node: fx.Node) -> bool:
    """Whether it switches gradients, autocast or the like on or off, as graphs of a compiler do."""
    return str(getattr(node.target, "__name__", node.target)).startswith(("_enter_", "_exit_", "_set_"))


def _writes(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether it changes its first argument, or the context in which later nodes run."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = str(getattr(node.target, "__name__", node.target))
    in_place = (name.endswith("_") and not name.endswith("__")) or is_context(node)
    given = node.kwargs
    return in_place or name in (*IN_PLACE, "setitem") or given.get("inplace") is True or given.get("out") is not None


class _Matcher:
    def __init__(
        self, root: nn.Module, graph: fx.Graph, training: bool, barred: dict[nn.Module, str], banned: set[fx.Node]
    ) -> None:
        self.root, self.graph, self.training, self.banned = root, graph, training, banned
        self.nodes = list(graph.nodes)
        self.position = {n: i for i, n in enumerate(self.nodes)}
        self.module = {n: _module(root, n) for n in self.nodes}
        self.norms = find_functional_norms(root, graph, training)
        self.checks = vacuous_checks(graph)
        calls: Counter[Any] = Counter(m for m in self.module.values() if isinstance(m, (nn.Conv2d, *NORMS)))
        calls.update(norm.module for norm in self.norms.values())
        self.barred: dict[Any, str] = {m: "called more than once" for m, n in calls.items() if n > 1}
        self.barred.update(barred)
        self.alias: dict[fx.Node, fx.Node] = {}
        for n in self.nodes:
            if (
                _does_nothing(n, self.module[n])
                and self.module[n] not in barred
                and n.args
                and isinstance(n.args[0], fx.Node)
            ):
                self.alias[n] = self.canonical(n.args[0])
        self.readers: dict[fx.Node, list[fx.Node]] = {n: [] for n in self.nodes}
        for n in self.nodes:
            if n not in self.alias:
                # A node that reads a value twice counts twice.
                fx.node.map_arg((n.args, n.kwargs), partial(self._note_reader, n))
        self.layer: dict[fx.Node, MatchedLayer] = {}  # by the value that it ends with
        self.depth: dict[fx.Node, int] = {}
        self.reasons: dict[fx.Node, str] = {}

    def _note_reader(self, reader: fx.Node, value: fx.Node) -> fx.Node:
        if reader not in self.checks.get(value, ()):
            self.readers[self.canonical(value)].append(reader)
        return value

    def canonical(self, node: Any) -> fx.Node:
        return self.alias.get(node, node)

    def layers(self) -> list[MatchedLayer]:
        """In the order in which they can run."""
        for n in self.nodes:
            inputs = [self.canonical(a) for a in n.all_input_nodes]
            self.depth[n] = max((self.depth[a] for a in inputs), default=0)
            if n in self.alias:
                continue
            module = self.module[n]
            if module in self.barred and not isinstance(module, (nn.Conv2d, *NORMS)):
                continue
            if isinstance(module, nn.Conv2d):
                self.depth[n] += 1
                self._conv(n, module)
            elif isinstance(module, NORMS) and inputs:
                self._bn(n, str(n.target), module, inputs[0], structure_reason(None, module))
            elif n in self.norms:
                norm = self.norms[n]
                self._bn(n, norm.path, norm.module, self.canonical(norm.input), None)
            elif _is_relu(n, module) and inputs:
                self._relu(n, inputs[0])
            elif _is(n, _ADD) and n not in self.banned:
                self._add(n)
        return sorted(self.layer.values(), key=lambda layer: self.position[layer.value])

    def _conv(self, n: fx.Node, module: nn.Conv2d) -> None:
        reason = structure_reason(module, None) or self.barred.get(module)
        if reason is None and (len(n.args) != 1 or n.kwargs or not isinstance(n.args[0], fx.Node)):
            reason = "called with more than an input"
        if reason is not None:
            self.reasons[n] = reason
            return
        self.layer[n] = MatchedLayer(n, self.canonical(n.args[0]), n, aside=self.checks.get(n, set()))

    def _extend(self, n: fx.Node, value: fx.Node) -> MatchedLayer:
        layer = self.layer.pop(value)
        layer.value = n
        self.layer[n] = layer
        return layer

    def _bn(self, n: fx.Node, path: str, module: nn.Module, value: fx.Node, reason: str | None) -> None:
        layer = self.layer.get(value)
        if layer is None or layer.value is not layer.conv:
            return
        reason = reason or self.barred.get(module)
        if reason is None and len(self.readers[value]) > 1:
            reason = "its result is used before the batch norm, too"
        if reason is not None:
            self.reasons[layer.conv] = reason
            return
        layer = self._extend(n, value)
        layer.bn, layer.bn_path = n, path
        if n in self.norms:
            layer.aside = layer.aside | self.norms[n].aside
            layer.frozen_eps = self.norms[n].frozen_eps

    def _relu(self, n: fx.Node, value: fx.Node) -> None:
        layer = self.layer.get(value)
        if layer is not None and layer.bn is not None and layer.relu is None and len(self.readers[value]) == 1:
            self._extend(n, value).relu = n

    def _add(self, n: fx.Node) -> None:
        if len(n.args) != 2 or n.kwargs or not all(isinstance(a, fx.Node) for a in n.args):
            return
        a, b = (self.canonical(arg) for arg in n.args)
        # Nobody else may read what is added to in place.
        if a is b or (_writes(n, None) and len(self.readers[a]) > 1):
            return
        ends = [v for v in (a, b) if self._takes_sum(v)]
        # The kernels of training mode add only where a ReLU follows.
        if not ends or (self.training and not self._goes_into_relu(n)):
            return
        # The longer path is the block's body, the shorter one its shortcut.
        main = max(ends, key=lambda v: (self.depth[v], self.position[v]))
        layer = self._extend(n, main)
        layer.add, layer.residual = n, b if main is a else a

    def _goes_into_relu(self, value: fx.Node) -> bool:
        readers = self.readers[value]
        return len(readers) == 1 and _is_relu(readers[0], self.module[readers[0]])

    def _takes_sum(self, value: fx.Node) -> bool:
        layer = self.layer.get(value)
        return layer is not None and layer.value is layer.bn and len(self.readers[value]) == 1

    def is_closed(self, layers: list[MatchedLayer]) -> bool:
        """Whether nothing outside reads a result but the last one's."""
        nodes = set().union(*(layer.nodes for layer in layers))
        inner = [layer.value for layer in layers[:-1]]
        return all(r in nodes for value in inner for r in self.readers[value])

    def chain(self, layers: list[MatchedLayer]) -> MatchedChain:
        nodes = set().union(*(layer.nodes for layer in layers))
        noops = []
        for n in sorted(nodes, key=self.position.__getitem__):
            for a in n.all_input_nodes:
                while a in self.alias and a not in noops:
                    noops.append(a)
                    a = a.args[0]  # type: ignore[assignment]
        return MatchedChain(layers[0].source, layers, nodes, noops)

    def is_undisturbed(self, layers: list[MatchedLayer]) -> bool:
        """A chain runs where its last node stands: nothing in between may change a value in place."""
        nodes = set().union(*(layer.nodes for layer in layers))
        places = [self.position[n] for n in nodes]
        foreign = (n for n in self.nodes[min(places) : max(places)] if n not in nodes and n not in self.alias)
        return not any(_writes(n, self.module[n]) for n in foreign)

    def chains(self) -> tuple[list[MatchedChain], set[fx.Node]]:
        """The longest chains, from the first layer on; and the sums whose two sides do not come from one input."""
        waiting = self.layers()
        found: list[MatchedChain] = []
        apart: set[fx.Node] = set()
        while waiting:
            first = waiting[0]
            if first.residual is not None and first.residual is not first.source and first.add is not None:
                apart.add(first.add)
            group, values = [first], {first.source, first.value}
            best = 1
            for layer in waiting[1:]:
                if layer.inputs <= values:
                    group.append(layer)
                    values.add(layer.value)
                    inner = all(part.bn is not None for part in group[:-1])
                    if inner and self.is_closed(group) and self.is_undisturbed(group):
                        best = len(group)
            group = group[:best]
            waiting = [layer for layer in waiting if layer not in group]
            if all(layer.bn is None for layer in group):
                self._without_bn(first)
            elif self.training and self._is_pointwise_alone(group):
                self.reasons[first.conv] = ALONE
            elif self.is_undisturbed(group):
                found.append(self.chain(group))
            else:
                self.reasons[first.conv] = "something is changed in place in between"
        return found, apart

    def _is_pointwise_alone(self, layers: list[MatchedLayer]) -> bool:
        conv = self.module[layers[0].conv]
        return len(layers) == 1 and layers[0].add is None and isinstance(conv, nn.Conv2d) and conv.kernel_size == (1, 1)

    def _without_bn(self, layer: MatchedLayer) -> None:
        if layer.conv not in self.reasons:
            readers = [r for r in self.readers[layer.value] if r is not layer.conv]
            after = describe(self.root, readers[0]) if readers else "nothing"
            self.reasons[layer.conv] = f"{after} behind it, where a BatchNorm2d would be"


def match(root: nn.Module, graph: fx.Graph, training: bool, barred: dict[nn.Module, str]) -> Match:
    """The longest chains in ``graph``, a trace in that mode, without the modules in ``barred``, each for its reason."""
    banned: set[fx.Node] = set()
    while True:
        matcher = _Matcher(root, graph, training, barred, banned)
        chains, apart = matcher.chains()
        if not apart:
            break
        banned |= apart
    inside = set().union(*(chain.nodes for chain in chains)) if chains else set()
    values = {layer.value for chain in chains for layer in chain.layers}
    leftover = (
        (n, a)
        for n in matcher.nodes
        if n.op != "output" and n not in inside and n not in matcher.alias
        for a in map(matcher.canonical, n.all_input_nodes)
        if a in values
    )
    return Match(chains, matcher.reasons, next(leftover, None), matcher.alias)

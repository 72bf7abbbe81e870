"""Dynamo's graph with a call of a :class:`.runner.Runner` in the place of each chain of layers.

:func:`resnet_fast.compiler.backend` hands the graph in: :mod:`.lift` makes its layers modules,
:mod:`resnet_fast.fusion.pattern` finds chains of them, :mod:`.stages` cuts these, and :func:`chains_of` replaces them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..fusion.execution_plan import LayerPaths
from ..fusion.pattern import MatchedChain, MatchedLayer, match
from .lift import LiftedGraph, lift, path_of
from .runner import GraphChain, Runner, nodes_of
from .stages import stages

__all__ = ["ChainGraph", "chains_of"]


_NO_LAYER = "its weights are no parameters, its settings no numbers, or its batch norm is not its own"


@dataclass
class ChainGraph:
    """``graph`` runs ``chains``. reasons: the other convolutions, and why they are in none."""

    graph: fx.Graph
    chains: list[GraphChain] = field(default_factory=list)
    reasons: list[tuple[str, str]] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)  # functions that the graph calls for the chains

    @property
    def fused(self) -> int:
        """Convolutions in chains."""
        return sum(len(chain.paths) for chain in self.chains)

    @property
    def layers(self) -> int:
        return self.fused + len(self.reasons)

    def __str__(self) -> str:
        lines = [f"{self.fused} of {self.layers} convolutions fused, in {len(self.chains)} chains"]
        lines += [f"{chain.name}: {len(chain.paths)} convolutions" for chain in self.chains]
        lines += [f"{name}: not fused: {reason}" for name, reason in self.reasons]
        return "\n".join(lines)


@dataclass
class _Subgraph:
    """A matched chain as nodes of Dynamo's graph: ``inside`` are those that it replaces, in order."""

    runner: Runner
    entry: fx.Node
    end: fx.Node
    inside: list[fx.Node]


def chains_of(graph: fx.Graph, lasting: dict[fx.Node, torch.Tensor]) -> ChainGraph:
    """``graph`` with its chains found; see :func:`resnet_fast.compiler.lift.lift` for ``lasting``."""
    lifted = lift(graph, lasting)
    matched = match(lifted.root, lifted.graph, lifted.training, {})
    extractor = _Extractor(lifted, graph, matched.alias)
    subgraphs = [extractor.subgraph(chain) for chain in matched.chains]
    inside = {n for subgraph in subgraphs for n in subgraph.inside}
    known = {lifted.layers[call].node: reason for call, reason in matched.reasons.items()}
    left = [n for n in graph.nodes if n.target is torch.conv2d and n not in inside]
    reasons = [(_name(n), known.get(n, _NO_LAYER)) for n in left]
    calls = {subgraph.end: _function(subgraph.runner) for subgraph in subgraphs}
    chains = [chain for subgraph in subgraphs for chain in subgraph.runner.chains]
    return ChainGraph(_with_calls(graph, subgraphs, calls), chains, reasons, list(calls.values()))


def _name(node: fx.Node) -> str:
    return ".".join(path_of(node)) or node.name


class _Extractor:
    """Takes chains of layers out of a graph."""

    def __init__(self, lifted: LiftedGraph, graph: fx.Graph, alias: dict[fx.Node, fx.Node]) -> None:
        self.lifted, self.alias = lifted, alias
        self.position = {n: i for i, n in enumerate(graph.nodes)}

    def subgraph(self, chain: MatchedChain) -> _Subgraph:
        runner = Runner(self.lifted.training, [self._chain(layers) for layers in stages(chain)])
        inside = {o for n in chain.nodes for o in self.lifted.origin[n]}
        noops = {o for n in chain.noops for o in self.lifted.origin[n]}
        for n in sorted(noops, key=self.position.__getitem__, reverse=True):
            if all(user in inside for user in n.users):
                inside.add(n)
        entry, end = self._end(chain.entry), self._end(chain.layers[-1].value)
        return _Subgraph(runner, entry, end, sorted(inside, key=self.position.__getitem__))

    def _end(self, value: fx.Node) -> fx.Node:
        return self.lifted.origin[value][-1]

    def _chain(self, matched: list[MatchedLayer]) -> GraphChain:
        calls, origin = self.lifted.layers, self.lifted.origin
        numbers = {matched[0].source: 0, **{layer.value: i for i, layer in enumerate(matched, 1)}}
        layers = [calls[n] for layer in matched for n in (layer.conv, layer.bn) if n is not None]
        paths = [
            LayerPaths(
                (calls[layer.conv].name,),
                None if layer.bn is None else (calls[layer.bn].name,),
                None if layer.relu is None else (),
                numbers[layer.source],
                None if layer.residual is None else numbers[layer.residual],
                None if layer.bn is None else calls[layer.bn].frozen_eps,
            )
            for layer in matched
        ]
        nodes = set().union(*(layer.nodes for layer in matched))
        nodes = {o for n in (*nodes, *self._noops(nodes)) for o in origin[n]}
        inputs = [self._end(matched[0].source), *nodes_of(layers)]
        unfused = _unfused(sorted(nodes, key=self.position.__getitem__), inputs, self._end(matched[-1].value))
        return GraphChain(f"{_name(layers[0].node)} and what follows", paths, layers, unfused)

    def _noops(self, nodes: set[fx.Node]) -> list[fx.Node]:
        """Nodes that do nothing on the way to ``nodes``, such as a dropout that is off."""
        found: dict[fx.Node, None] = {}
        for n in nodes:
            for a in n.all_input_nodes:
                while a in self.alias and a not in found:
                    found[a] = None
                    a = a.all_input_nodes[0]
        return list(found)


def _unfused(nodes: list[fx.Node], inputs: list[fx.Node], end: fx.Node) -> Any:
    """``nodes`` as a function of ``inputs``."""
    graph = fx.Graph()
    copies = {n: graph.placeholder(n.name) for n in inputs}
    for n in nodes:
        copies[n] = graph.node_copy(n, copies.__getitem__)
    graph.output(copies[end])
    return fx.GraphModule({}, graph).forward


def _with_calls(graph: fx.Graph, subgraphs: list[_Subgraph], calls: dict[fx.Node, Any]) -> fx.Graph:
    """``graph`` with ``calls`` where the last nodes of ``subgraphs`` were."""
    ends = {subgraph.end: subgraph for subgraph in subgraphs}
    inside = {n for subgraph in subgraphs for n in subgraph.inside}
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for n in graph.nodes:
        subgraph = ends.get(n)
        if subgraph is not None:
            args = tuple(copies[a] for a in (subgraph.entry, *subgraph.runner.nodes))
            copies[n] = made.call_function(calls[n], args)
            copies[n].meta = dict(n.meta)
        elif n not in inside:
            copies[n] = made.node_copy(n, copies.__getitem__)
    return made


def _function(runner: Runner) -> Any:
    """``runner`` as a function: the graph's generated code calls it by its name."""

    def chain(x: torch.Tensor, *inputs: Any) -> torch.Tensor:
        return runner(x, *inputs)

    return chain

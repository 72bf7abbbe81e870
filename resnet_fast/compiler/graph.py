"""Dynamo's graph with its chains of layers in the place of the nodes that they were."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..fusion.pattern import Layer, Run, match
from ..fusion.plan import LayerPaths
from .lift import Lifted, lift, path_of
from .runner import Chain, Runner, nodes_of
from .stages import stages

__all__ = ["ChainGraph", "chains_of"]


_NO_LAYER = "its weights are no parameters, its settings no numbers, or its batch norm is not its own"


@dataclass
class ChainGraph:
    """``graph`` runs ``chains``. ``reasons``: the other convolutions, and why they are in none."""

    graph: fx.Graph
    chains: list[Chain] = field(default_factory=list)
    reasons: list[tuple[str, str]] = field(default_factory=list)
    calls: list[Any] = field(default_factory=list)  # targets of the calls

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
class _Piece:
    """A run as nodes of Dynamo's graph: ``inside`` is what it stands for, in order."""

    runner: Runner
    entry: fx.Node
    end: fx.Node
    inside: list[fx.Node]


def chains_of(graph: fx.Graph, held: dict[fx.Node, torch.Tensor]) -> ChainGraph:
    """``graph`` with its chains found; see :func:`resnet_fast.compiler.lift.lift` for ``held``."""
    lifted = lift(graph, held)
    matched = match(lifted.root, lifted.graph, lifted.training, {})
    cut = _Cut(lifted, graph, matched.alias)
    pieces = [cut.piece(run) for run in matched.runs]
    inside = {n for piece in pieces for n in piece.inside}
    known = {lifted.layers[call].node: reason for call, reason in matched.reasons.items()}
    left = [n for n in graph.nodes if n.target is torch.conv2d and n not in inside]
    reasons = [(_name(n), known.get(n, _NO_LAYER)) for n in left]
    calls = {piece.end: _function(piece.runner) for piece in pieces}
    chains = [chain for piece in pieces for chain in piece.runner.chains]
    return ChainGraph(_written(graph, pieces, calls), chains, reasons, list(calls.values()))


def _name(node: fx.Node) -> str:
    return ".".join(path_of(node)) or node.name


class _Cut:
    """Takes runs of layers out of a graph."""

    def __init__(self, lifted: Lifted, graph: fx.Graph, alias: dict[fx.Node, fx.Node]) -> None:
        self.lifted, self.alias = lifted, alias
        self.position = {n: i for i, n in enumerate(graph.nodes)}

    def piece(self, run: Run) -> _Piece:
        runner = Runner(self.lifted.training, [self._chain(layers) for layers in stages(run)])
        inside = {o for n in run.nodes for o in self.lifted.origin[n]}
        through = {o for n in run.through for o in self.lifted.origin[n]}
        for n in sorted(through, key=self.position.__getitem__, reverse=True):
            if all(user in inside for user in n.users):
                inside.add(n)
        entry, end = self._end(run.entry), self._end(run.layers[-1].value)
        return _Piece(runner, entry, end, sorted(inside, key=self.position.__getitem__))

    def _end(self, value: fx.Node) -> fx.Node:
        return self.lifted.origin[value][-1]

    def _chain(self, matched: list[Layer]) -> Chain:
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
        nodes = {o for n in (*nodes, *self._through(nodes)) for o in origin[n]}
        inputs = [self._end(matched[0].source), *nodes_of(layers)]
        unfused = _unfused(sorted(nodes, key=self.position.__getitem__), inputs, self._end(matched[-1].value))
        return Chain(f"{_name(layers[0].node)} and what follows", paths, layers, unfused)

    def _through(self, nodes: set[fx.Node]) -> list[fx.Node]:
        """What does nothing on the way to ``nodes``, such as a dropout that is off."""
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


def _written(graph: fx.Graph, pieces: list[_Piece], calls: dict[fx.Node, Any]) -> fx.Graph:
    """``graph`` with ``calls`` where the last nodes of ``pieces`` were."""
    ends = {piece.end: piece for piece in pieces}
    inside = {n for piece in pieces for n in piece.inside}
    written = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for n in graph.nodes:
        piece = ends.get(n)
        if piece is not None:
            args = tuple(copies[a] for a in (piece.entry, *piece.runner.nodes))
            copies[n] = written.call_function(calls[n], args)
            copies[n].meta = dict(n.meta)
        elif n not in inside:
            copies[n] = written.node_copy(n, copies.__getitem__)
    return written


def _function(runner: Runner) -> Any:
    """What the code of a graph can call by a name."""

    def chain(x: torch.Tensor, *inputs: Any) -> torch.Tensor:
        return runner(x, *inputs)

    return chain

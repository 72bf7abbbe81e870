"""Compiles what is no chain in a graph by another backend, in pieces between the chains.

:func:`resnet_fast.compiler.backend` calls :func:`with_compiled_rest` where ``options`` name one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.fx.passes.split_module import split_module

from ..fusion.pattern import is_context

__all__ = ["with_compiled_rest"]


def _parts(graph: fx.Graph, apart: set[Any]) -> dict[fx.Node, int]:
    """The number of the part that each node goes into; parts with odd numbers are compiled.

    apart: targets of calls that stay as they are; so do calls that switch a context.
    """
    number, found = 0, {}
    for n in graph.nodes:
        if n.op in ("placeholder", "get_attr", "output"):
            continue
        stays = n.target in apart or is_context(n)
        number += (number % 2 == 1) == stays
        found[n] = number
    return found


def with_compiled_rest(
    graph_module: fx.GraphModule, apart: set[Any], compiler: Callable[..., Callable[..., Any]]
) -> fx.GraphModule:
    """``graph_module`` with all but the calls of ``apart`` compiled by ``compiler``, a backend of ``torch.compile``."""
    parts = _parts(graph_module.graph, apart)
    if not any(number % 2 for number in parts.values()):
        return graph_module
    split: fx.GraphModule = split_module(
        graph_module, nn.Module(), parts.__getitem__, keep_original_order=True, keep_original_node_name=True
    )
    examples: dict[fx.Node, Any] = {}
    for n in split.graph.nodes:
        if n.op == "call_module":
            part = split.get_submodule(str(n.target))
            assert isinstance(part, fx.GraphModule)
            examples[n] = fx.node.map_arg(part.graph.output_node().args[0], _example)
            call: Callable[..., Any] = part.forward
            if int(str(n.target).rpartition("_")[2]) % 2:
                call = _compiled(part, [examples.get(a, a) for a in n.args], compiler)
            n.op, n.target = "call_function", _named(call)
        elif n.target is operator.getitem and n.args[0] in examples and n.args[0].op == "call_function":
            examples[n] = examples[n.args[0]][n.args[1]]
        elif n.op != "output":
            examples[n] = getattr(split, str(n.target)) if n.op == "get_attr" else _example(n)
    split.recompile()
    return split


def _compiled(part: fx.GraphModule, inputs: list[Any], compiler: Callable[..., Callable[..., Any]]) -> Any:
    """``part`` by ``compiler``, which wants a graph that returns a tuple."""
    output = part.graph.output_node()
    if isinstance(output.args[0], tuple):
        return compiler(part, inputs)
    output.args = ((output.args[0],),)
    part.recompile()
    call = compiler(part, inputs)
    return lambda *args: call(*args)[0]


def _named(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` as a function: the graph's generated code calls it by its name."""

    def part(*args: Any) -> Any:
        return call(*args)

    return part


def _example(node: fx.Node) -> Any:
    """The fake tensor that Dynamo traced the node with."""
    return node.meta.get("example_value")

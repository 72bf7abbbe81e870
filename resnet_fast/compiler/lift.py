"""Lifts convolutions and batch norms in Dynamo's graph into modules, so :mod:`resnet_fast.fusion.pattern` can match it.

:mod:`.graph` hands the graph in and gets a :class:`LiftedGraph`. Dynamo traces ``nn.Conv2d`` and ``nn.BatchNorm2d``
into calls of ``torch.conv2d`` and ``F.batch_norm`` on inputs of the graph. Each such call whose tensors are parameters,
buffers or attributes becomes a module again, together with the count of batches that ``nn.BatchNorm2d`` keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..chain.frozen_norm import FrozenCode, read_frozen

__all__ = ["LiftedGraph", "LiftedLayer", "lift", "path_of"]

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_NORM_DEFAULTS = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
_INCREMENTS = {"add_", torch.Tensor.add_}


@dataclass(eq=False)
class LiftedLayer:
    """A convolution or a batch norm of the graph. inputs: what its module holds, by name: nodes, or values."""

    name: str
    path: str  # of the module that it was in, as far as the graph knows
    node: fx.Node
    inputs: dict[str, Any]
    settings: dict[str, Any]
    image: fx.Node
    aside: list[fx.Node]  # its other nodes: the count of batches, or the code of a frozen batch norm
    frozen_eps: float | None = None  # of a frozen batch norm

    @property
    def nodes(self) -> list[fx.Node]:
        """Nodes of the graph that the module stands for."""
        return [*self.aside, self.node]

    def module(self, given: dict[fx.Node, Any]) -> nn.Module:
        """The layer as a module that holds the tensors ``given`` for its inputs."""
        values = {
            name: given.get(value, value) if isinstance(value, fx.Node) else value
            for name, value in self.inputs.items()
        }
        return _convolution(values, self.settings) if "stride" in self.settings else _batch_norm(values, self.settings)


def _convolution(values: dict[str, Any], settings: dict[str, Any]) -> nn.Conv2d:
    weight, bias = values["weight"], values["bias"]
    channels, kernel = weight.shape[:2], weight.shape[2:]
    conv = nn.Conv2d(
        channels[1] * settings["groups"], channels[0], tuple(kernel), bias=bias is not None, device="meta", **settings
    )
    conv._parameters.update(weight=weight, bias=bias)
    return conv


def _batch_norm(values: dict[str, Any], settings: dict[str, Any]) -> nn.BatchNorm2d:
    tensors = [t for name in ("running_mean", "weight", "bias") if (t := values[name]) is not None]
    bn = nn.BatchNorm2d(
        len(tensors[0]) if tensors else 1,
        eps=float(values["eps"]),
        momentum=float(values["momentum"]),
        affine=values["weight"] is not None or values["bias"] is not None,
        track_running_stats=values["running_mean"] is not None or values["running_var"] is not None,
        device="meta",
    )
    bn._parameters.update(weight=values["weight"], bias=values["bias"])
    bn._buffers.update({name: values[name] for name in ("running_mean", "running_var", "num_batches_tracked")})
    return bn.train(settings["training"])


class _Root(nn.Module):
    """Holds the layers; any other module that a graph calls is no layer."""

    def get_submodule(self, target: str) -> nn.Module:
        return self._modules.get(target) or _OTHER


_OTHER = nn.Module()


@dataclass
class LiftedGraph:
    """``graph`` calls the modules of ``root``, which hold the structure alone: their tensors are on the meta device."""

    root: nn.Module
    graph: fx.Graph
    layers: dict[fx.Node, LiftedLayer]  # by the node of ``graph`` that calls its module
    origin: dict[fx.Node, list[fx.Node]]  # the nodes of Dynamo's graph, in order

    @property
    def training(self) -> bool:
        """Whether a batch norm takes the statistics of the batch: all that a graph knows of the mode of its modules."""
        return any(isinstance(m, nn.BatchNorm2d) and m.training for m in self.root.children())


def _arguments(node: fx.Node, names: Sequence[str], defaults: dict[str, Any]) -> dict[str, Any]:
    return {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}


def path_of(node: fx.Node) -> tuple[str, ...]:
    """Names that lead to the module whose code the node comes from, as far as they are known."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return ()
    name = str(stack[-1][0])
    for sign in ("L['self']", "L[self]"):
        name = name.removeprefix(sign)
    return tuple(part for part in name.strip(".").split(".") if part)


class _Lifting:
    def __init__(self, graph: fx.Graph, lasting: set[fx.Node]) -> None:
        self.nodes, self.lasting = list(graph.nodes), lasting
        self.counters = self._counters()
        self.frozen = {code.end: code for code in read_frozen(graph, lasting.__contains__)}
        self.names: set[str] = set()

    def _holds(self, value: Any) -> bool:
        return value is None or (isinstance(value, fx.Node) and value in self.lasting)

    def _counters(self) -> dict[fx.Node, fx.Node]:
        """Nodes that count a batch, by the batch norm that follows; nothing else reads or writes the count."""
        found: dict[fx.Node, fx.Node] = {}
        waiting: fx.Node | None = None
        for n in self.nodes:
            if n.target in _INCREMENTS and n.args[1:] == (1,) and not n.kwargs and not n.users:
                count = n.args[0]
                waiting = n if self._holds(count) and len(count.users) == 1 else waiting
            elif n.target is F.batch_norm:
                if waiting is not None and _arguments(n, _NORM, _NORM_DEFAULTS)["training"] is True:
                    found[n] = waiting
                waiting = None
        return found

    def layer(self, n: fx.Node) -> LiftedLayer | None:
        """``n`` as a layer, if it is one that a module can stand for."""
        if n in self.frozen:
            return self._frozen_norm(self.frozen[n])
        if n.op != "call_function":
            return None
        if n.target is torch.conv2d:
            given = _arguments(n, _CONV, _CONV_DEFAULTS)
            inputs = {name: given[name] for name in ("weight", "bias")}
            settings = {name: given[name] for name in _CONV[3:]}
            plain = given["weight"] is not None and _is_plain(settings)
        elif n.target is F.batch_norm:
            given = _arguments(n, _NORM, _NORM_DEFAULTS)
            inputs = {name: given[name] for name in _NORM[1:5]}
            settings = {"training": given["training"]}
            plain = isinstance(given["training"], bool) and self._norm_is_plain(n, given)
        else:
            return None
        if not plain or not isinstance(given["input"], fx.Node) or not all(map(self._holds, inputs.values())):
            return None
        if not {*given} <= {*_CONV, *_NORM}:
            return None
        aside = [self.counters[n]] if n in self.counters else []
        if n.target is F.batch_norm:
            inputs |= {name: given[name] for name in ("momentum", "eps")}
            inputs["num_batches_tracked"] = aside[0].args[0] if aside else None
        path = ".".join(path_of(n))
        return LiftedLayer(self._name(path or n.name), path, n, inputs, settings, given["input"], aside)

    def _frozen_norm(self, code: FrozenCode) -> LiftedLayer:
        path = ".".join(path_of(code.end))
        inputs = {**code.tensors, "momentum": 0.0, "eps": code.eps, "num_batches_tracked": None}
        aside = sorted(code.aside, key=self.nodes.index)
        name = self._name(path or code.end.name)
        return LiftedLayer(name, path, code.end, inputs, {"training": False}, code.input, aside, code.eps)

    def _norm_is_plain(self, n: fx.Node, given: dict[str, Any]) -> bool:
        """Settings are numbers, at the latest when the graph runs; no other node uses the running statistics."""
        if any(not isinstance(given[name], (float, int, fx.Node)) for name in ("momentum", "eps")):
            return False
        kept = [given[name] for name in ("running_mean", "running_var") if given["training"]]
        return all(t is None or (isinstance(t, fx.Node) and set(t.users) == {n}) for t in kept)

    def _name(self, wish: str) -> str:
        name = base = wish.replace(".", "_")
        number = 1
        while name in self.names:
            number += 1
            name = f"{base}_{number}"
        self.names.add(name)
        return name


def _is_plain(value: Any) -> bool:
    """Whether it is made of numbers and strings that are known before the graph runs."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (int, str))


def _shaped(node: fx.Node, lasting: dict[fx.Node, torch.Tensor]) -> Any:
    """A meta tensor in the shape of what ``node`` holds; any number for one that only the call knows."""
    return torch.empty(tuple(lasting[node].shape), device="meta") if node in lasting else 1.0


def lift(graph: fx.Graph, lasting: dict[fx.Node, torch.Tensor]) -> LiftedGraph:
    """Dynamo's ``graph``, lifted. lasting: examples of the inputs and attributes that last from call to call, as
    parameters and buffers do, so that packing them pays."""
    lifting = _Lifting(graph, {n for n, t in lasting.items() if all(isinstance(size, int) for size in t.shape)})
    found = [layer for n in lifting.nodes if (layer := lifting.layer(n)) is not None]
    by_node = {layer.node: layer for layer in found}
    aside = {n for layer in found for n in layer.aside}
    lifted = LiftedGraph(_Root(), fx.Graph(), {}, {})
    copies: dict[fx.Node, fx.Node] = {}
    for n in lifting.nodes:
        if n in aside:
            continue
        layer = by_node.get(n)
        if layer is None:
            copies[n] = lifted.graph.node_copy(n, copies.__getitem__)
        else:
            shapes = {value: _shaped(value, lasting) for value in layer.inputs.values() if isinstance(value, fx.Node)}
            lifted.root.add_module(layer.name, layer.module(shapes))
            copies[n] = lifted.graph.call_module(layer.name, (copies[layer.image],))
            copies[n].meta = dict(n.meta)
            lifted.layers[copies[n]] = layer
        lifted.origin[copies[n]] = [n] if layer is None else layer.nodes
    return lifted

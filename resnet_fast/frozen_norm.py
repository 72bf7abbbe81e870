"""Frozen batch norms: modules that hold four buffers and scale by them in any mode, as detection networks have them.

``x * scale + shift`` with ``scale = weight * rsqrt(running_var + eps)`` and ``shift = bias - running_mean * scale``,
each of ``[1, C, 1, 1]``, is read from the graph of the code: such modules are no ``nn.BatchNorm2d``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["FrozenNorm", "find_frozen"]

_TENSORS = ("weight", "bias", "running_mean", "running_var")
_ADD = (operator.add, torch.add, "add")
_MUL = (operator.mul, torch.mul, "mul")
_SUB = (operator.sub, torch.sub, "sub")
_RSQRT = (torch.rsqrt, "rsqrt")
_SHAPES = ("reshape", "view")
_CHANNELS = (1, -1, 1, 1)


class FrozenNorm:
    """What chains ask of a batch norm in eval mode, for a module that is one by its code."""

    training = track_running_stats = False
    momentum = num_batches_tracked = None

    def __init__(self, module: Any, eps: float) -> None:
        self.weight: Tensor = module.weight
        self.bias: Tensor = module.bias
        self.running_mean: Tensor = module.running_mean
        self.running_var: Tensor = module.running_var
        self.eps = eps

    def fits(self, weight: Tensor) -> bool:
        """Whether products with its tensors have the shape and the dtype of what a convolution by ``weight`` gives."""
        tensors = (self.weight, self.bias, self.running_mean, self.running_var)
        return all(t.shape == weight.shape[:1] and t.dtype == weight.dtype for t in tensors)


class _Reading:
    """Of the code of one frozen batch norm; ``nodes`` are those that it consists of."""

    def __init__(self) -> None:
        self.nodes: set[fx.Node] = set()
        self.path = ""

    def tensor(self, node: Any, name: str) -> bool:
        """Whether ``node`` is the tensor ``name`` of the module, a channel a row."""
        if not isinstance(node, fx.Node) or node.op != "call_method" or node.target not in _SHAPES:
            return False
        source, *shape = node.args
        sizes: Any = shape[0] if len(shape) == 1 else shape
        if not isinstance(source, fx.Node) or source.op != "get_attr" or tuple(sizes) != _CHANNELS or node.kwargs:
            return False
        path, _, attribute = str(source.target).rpartition(".")
        self.path = self.path or path
        self.nodes |= {source, node}
        return attribute == name and path == self.path

    def parts(self, node: Any, targets: tuple[Any, ...], ordered: bool = False) -> Iterator[tuple[Any, Any]]:
        """The two operands of a sum, a product or a difference, in both orders where that is the same."""
        if isinstance(node, fx.Node) and node.target in targets and len(node.args) == 2 and not node.kwargs:
            self.nodes.add(node)
            a, b = node.args
            yield a, b
            if not ordered:
                yield b, a

    def eps(self, node: Any) -> float | None:
        """Of ``weight * rsqrt(running_var + eps)``."""
        for weight, root in self.parts(node, _MUL):
            if self.tensor(weight, "weight") and isinstance(root, fx.Node) and root.target in _RSQRT:
                self.nodes.add(root)
                for variance, eps in self.parts(root.args[0], _ADD):
                    if self.tensor(variance, "running_var") and isinstance(eps, (int, float)):
                        return float(eps)
        return None

    def is_shift(self, node: Any, scale: fx.Node) -> bool:
        """``bias - running_mean * scale``"""
        for bias, product in self.parts(node, _SUB, ordered=True):
            for mean, factor in self.parts(product, _MUL):
                if factor is scale and self.tensor(mean, "running_mean"):
                    return self.tensor(bias, "bias")
        return False


def find_frozen(root: nn.Module, graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node, str, float, set[fx.Node]]]:
    """Of each frozen batch norm: the node that ends it, its input, its path, eps, and the other nodes that it is."""
    for n in graph.nodes:
        for product, shift in _Reading().parts(n, _ADD):
            for x, scale in _Reading().parts(product, _MUL):
                reading = _Reading()
                eps = reading.eps(scale)
                if eps is None or not isinstance(x, fx.Node) or not reading.is_shift(shift, scale):
                    continue
                aside = reading.nodes | {product}
                module = root.get_submodule(reading.path)
                own = reading.path and all(isinstance(getattr(module, name, None), Tensor) for name in _TENSORS)
                if own and all(user in aside or user is n for node in aside for user in node.users):
                    yield n, x, reading.path, eps, aside

"""Frozen batch norms: modules with four buffers that normalise by them in any mode, as detection networks have them.

They are no ``nn.BatchNorm2d``, so they are recognised in the traced graph: ``x * scale + shift`` with
``scale = weight * rsqrt(running_var + eps)`` and ``shift = bias - running_mean * scale``, each ``[1, C, 1, 1]``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["FrozenCode", "FrozenNorm", "find_frozen", "read_frozen"]

_ADD = (operator.add, torch.add, "add")
_MUL = (operator.mul, torch.mul, "mul")
_SUB = (operator.sub, torch.sub, "sub")
_RSQRT = (torch.rsqrt, "rsqrt")
_SHAPES = ("reshape", "view")
_CHANNELS = (1, -1, 1, 1)


class FrozenNorm:
    """The attributes of an ``nn.BatchNorm2d`` in eval mode that chains read, of a module whose code is one."""

    training = track_running_stats = False
    momentum = num_batches_tracked = None

    def __init__(self, module: Any, eps: float) -> None:
        self.weight: Tensor = module.weight
        self.bias: Tensor = module.bias
        self.running_mean: Tensor = module.running_mean
        self.running_var: Tensor = module.running_var
        self.eps = eps

    def fits(self, weight: Tensor) -> bool:
        """Whether its tensors have the channels and the dtype of the output of a convolution by ``weight``."""
        tensors = (self.weight, self.bias, self.running_mean, self.running_var)
        return all(t.shape == weight.shape[:1] and t.dtype == weight.dtype for t in tensors)


@dataclass(frozen=True)
class FrozenCode:
    """The nodes of a frozen batch norm: ``end`` is the result, ``aside`` the intermediates, ``tensors`` by name."""

    end: fx.Node
    input: fx.Node
    eps: float
    tensors: dict[str, fx.Node]
    aside: set[fx.Node]


class _Reading:
    """Matches one frozen batch norm; ``holds(node)``: whether a node is a tensor of a module."""

    def __init__(self, holds: Callable[[fx.Node], bool]) -> None:
        self.holds = holds
        self.nodes: set[fx.Node] = set()
        self.tensors: dict[str, fx.Node] = {}

    def tensor(self, node: Any, name: str) -> bool:
        """Whether ``node`` is a module's tensor as ``[1, C, 1, 1]``; takes it for the tensor called ``name``."""
        if not isinstance(node, fx.Node) or node.op != "call_method" or node.target not in _SHAPES:
            return False
        source, *shape = node.args
        sizes: Any = shape[0] if len(shape) == 1 else shape
        if not isinstance(source, fx.Node) or not self.holds(source) or tuple(sizes) != _CHANNELS or node.kwargs:
            return False
        self.nodes.add(node)
        return self.tensors.setdefault(name, source) is source

    def parts(self, node: Any, targets: tuple[Any, ...], ordered: bool = False) -> Iterator[tuple[Any, Any]]:
        """The two operands of ``node`` if it calls one of ``targets``, in both orders unless ``ordered``."""
        if isinstance(node, fx.Node) and node.target in targets and len(node.args) == 2 and not node.kwargs:
            self.nodes.add(node)
            a, b = node.args
            yield a, b
            if not ordered:
                yield b, a

    def eps(self, node: Any) -> float | None:
        """The eps of ``weight * rsqrt(running_var + eps)``, or None if ``node`` is something else."""
        for weight, root in self.parts(node, _MUL):
            if self.tensor(weight, "weight") and isinstance(root, fx.Node) and root.target in _RSQRT:
                self.nodes.add(root)
                for variance, eps in self.parts(root.args[0], _ADD):
                    if self.tensor(variance, "running_var") and isinstance(eps, (int, float)):
                        return float(eps)
        return None

    def is_shift(self, node: Any, scale: fx.Node) -> bool:
        """Whether ``node`` is ``bias - running_mean * scale``."""
        for bias, product in self.parts(node, _SUB, ordered=True):
            for mean, factor in self.parts(product, _MUL):
                if factor is scale and self.tensor(mean, "running_mean"):
                    return self.tensor(bias, "bias")
        return False


def read_frozen(graph: fx.Graph, holds: Callable[[fx.Node], bool]) -> Iterator[FrozenCode]:
    """All frozen batch norms in ``graph`` whose tensors are nodes for which ``holds`` is true."""
    for n in graph.nodes:
        for product, shift in _Reading(holds).parts(n, _ADD):
            for x, scale in _Reading(holds).parts(product, _MUL):
                reading = _Reading(holds)
                eps = reading.eps(scale)
                if eps is None or not isinstance(x, fx.Node) or not reading.is_shift(shift, scale):
                    continue
                aside = reading.nodes | {product}
                if all(user in aside or user is n for node in aside for user in node.users):
                    yield FrozenCode(n, x, eps, reading.tensors, aside)


def find_frozen(root: nn.Module, graph: fx.Graph) -> Iterator[tuple[str, FrozenCode]]:
    """Frozen batch norms whose tensors are attributes of one module under these names, each with the module's path."""
    for code in read_frozen(graph, lambda node: node.op == "get_attr"):
        path = str(code.tensors["weight"].target).rpartition(".")[0]
        wanted = {name: f"{path}.{name}" for name in code.tensors}
        alone = all(user in code.aside for t in code.tensors.values() for user in t.users)
        if path and alone and {name: t.target for name, t in code.tensors.items()} == wanted:
            module = root.get_submodule(path)
            if all(isinstance(getattr(module, name, None), Tensor) for name in wanted):
                yield path, code

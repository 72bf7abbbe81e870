"""FLOP formulas of the operators for ``torch.utils.flop_counter``.

As for PyTorch's own convolutions: 2 FLOPs a multiply-add of the direct convolution, whatever algorithm runs; batch
norm, additions and ReLU count as zero. ``FlopCounterMode`` hooks every module, so modules run unfused under it: the
formulas serve calls of :mod:`resnet_fast.ops` and compiled programs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from math import prod
from typing import Any

import torch

from .spec import decode, shapes

__all__ = ["register", "register_when_imported"]

_COUNTER = "torch.utils.flop_counter"
_TENSORS = 6  # TENSORS of resnet_fast.chain.training.layers: tensors of a layer in training

Shape = Sequence[int]


def _layers(x: Shape, fields: Sequence[int]) -> list[tuple[int, int, int]]:
    """For each convolution of a chain: its source, its residual, and the FLOPs of its forward."""
    specs = decode(fields)
    sizes = shapes(specs, x[1:])
    return [
        (spec.source, spec.residual, 2 * x[0] * prod(size) * sizes[spec.source][0] * prod(spec.kernel))
        for spec, size in zip(specs, sizes[1:], strict=True)
    ]


def _conv(x: Shape, weight: Shape, *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * prod(out_shape) * prod(weight[1:])


def _conv_add(x: Shape, residual: Shape, weight: Shape, *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * prod(out_shape) * prod(weight[1:])


def _conv_bn_stats(x: Shape, affine: Any, relu: bool, weight: Shape, *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * prod(out_shape[0]) * prod(weight[1:])


def _conv_backward(
    grad: Shape, y: Any, coefficients: Any, x: Shape, affine: Any, relu: bool, weight: Shape, *rest: Any, **_: Any
) -> int:
    need_x, need_weight = rest[3:5]
    return (need_x + need_weight) * 2 * prod(grad) * prod(weight[1:])


def _stage(x: Shape, filters: Any, layers: Sequence[int], *_: Any, **__: Any) -> int:
    return sum(flops for *_, flops in _layers(x, layers))


def _train_chain(x: Shape, tensors: Any, present: Any, fields: Sequence[int], *_: Any, **__: Any) -> int:
    return sum(flops for *_, flops in _layers(x, fields))


def _train_chain_backward(
    grad: Shape,
    x: Shape,
    tensors: Any,
    kept: Any,
    present: Sequence[bool],
    fields: Sequence[int],
    eps: Any,
    batch: Any,
    needs: Sequence[bool],
    **_: Any,
) -> int:
    """The gradients of a weight and of an input each take as many FLOPs as the forward."""
    given = iter(needs[1:])
    wanted = [next(given) if there else False for there in present]
    needed, total = [needs[0]], 0
    for i, (source, residual, flops) in enumerate(_layers(x, fields)):
        own = wanted[i * _TENSORS : i * _TENSORS + 4]
        needed.append(any(own) or needed[source] or (residual >= 0 and needed[residual]))
        total += (own[0] + needed[source]) * flops
    return total


_FORMULAS = {
    "conv_bn": _conv,
    "conv_bn_relu": _conv,
    "conv_bn_add_relu": _conv_add,
    "conv_bn_stats": _conv_bn_stats,
    "conv_backward": _conv_backward,
    "conv_chain": _stage,
    "train_chain": _train_chain,
    "train_chain_backward": _train_chain_backward,
}


def register() -> None:
    """Registers the formulas with ``torch.utils.flop_counter``."""
    from torch.utils import flop_counter

    for name, formula in _FORMULAS.items():
        op = getattr(torch.ops.resnet_fast, name)
        if op not in flop_counter.flop_registry:
            decorate: Any = flop_counter.register_flop_formula(op)
            decorate(formula)


class _Finder:
    """An import hook: registers the formulas once ``torch.utils.flop_counter`` has been imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                register()

            loader.exec_module = execute_and_register
        return spec


def register_when_imported() -> None:
    """:func:`register` now if the counter is imported, else when it is: importing it takes longer than this package."""
    if _COUNTER in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _Finder())

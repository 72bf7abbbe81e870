"""What ``torch.utils.flop_counter`` counts for the operators: 2 a multiply-add of their convolutions as defined, as for
PyTorch's own, whatever the algorithm. Batch norm, sums and ReLU count as nothing there.

Under ``FlopCounterMode`` modules run unfused, as it hooks every module; operators are what calls of
:mod:`resnet_fast.ops` and programs of compilers hold.
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
_TENSORS = 6  # of a layer in training, as resnet_fast.chain.training.driver has them

Shape = Sequence[int]


def _layers(x: Shape, fields: Sequence[int]) -> list[tuple[int, int, int]]:
    """Of each convolution of a chain: the values that it reads and adds, and what its forward takes."""
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


def _conv_moments(x: Shape, affine: Any, relu: bool, weight: Shape, *_: Any, out_shape: Any, **__: Any) -> int:
    return 2 * prod(out_shape[0]) * prod(weight[1:])


def _conv_backward(
    grad: Shape, y: Any, coefficients: Any, x: Shape, affine: Any, relu: bool, weight: Shape, *rest: Any, **_: Any
) -> int:
    need_x, need_weight = rest[3:5]
    return (need_x + need_weight) * 2 * prod(grad) * prod(weight[1:])


def _stage(x: Shape, filters: Any, layers: Sequence[int], *_: Any, **__: Any) -> int:
    return sum(flops for *_, flops in _layers(x, layers))


def _train_stage(x: Shape, tensors: Any, present: Any, fields: Sequence[int], *_: Any, **__: Any) -> int:
    return sum(flops for *_, flops in _layers(x, fields))


def _train_stage_backward(
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
    """The gradient of a weight takes what the forward does, and so does that of an input that wants one."""
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
    "conv_moments": _conv_moments,
    "conv_backward": _conv_backward,
    "residual_stage": _stage,
    "train_stage": _train_stage,
    "train_stage_backward": _train_stage_backward,
}


def register() -> None:
    """Tells ``torch.utils.flop_counter`` of the operators."""
    from torch.utils import flop_counter

    for name, formula in _FORMULAS.items():
        op = getattr(torch.ops.resnet_fast, name)
        if op not in flop_counter.flop_registry:
            tell: Any = flop_counter.register_flop_formula(op)
            tell(formula)


class _Finder:
    """Finds the counter as Python would, and has it told of the operators behind its own code."""

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
    """:func:`register`, now or when somebody imports the counter: that takes several times what this package does."""
    if _COUNTER in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _Finder())

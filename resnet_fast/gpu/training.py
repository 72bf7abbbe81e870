"""Chain training on a GPU: only our kernels, no operator of PyTorch's between them; passes are replayed from C++.

The per-channel arithmetic that other devices leave to PyTorch's operators is in the kernels that reduce the partial
sums (:mod:`resnet_fast._triton.finalize`): a pass is then a list of launches that depends on shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from operator import is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from .._triton import filters, finalize
from ..chain.training.driver import ChainBackward, forward
from ..chain.training.kernels import Gradients, Kernels
from ..chain.training.layers import SAVED, Layer, SavedTensors, Value, dense
from . import training_operators as training
from .layer import precision
from .tape import Tapes
from .tune import forced

__all__ = ["GPU", "ReplayedPasses"]


class _PartialSums(NamedTuple):
    """Partial sums of a gradient's reductions; ``row``: that of ``g * (y - mean)`` for the layer."""

    partial: Tensor  # [parts, rows, C]
    row: int = 1


class _GpuKernels(Kernels):
    """The Triton kernels, and cuDNN's convolutions where they are faster."""

    def convolve(
        self, layer: Layer, source: Value, tensors: Sequence[Tensor | None], running: Any = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        weight, *vectors = tensors
        assert weight is not None
        bias, gamma, beta, mean, var = map(_dense, vectors)
        x = source.tensor
        packed = filters.packed(weight, x.dtype)
        y, partial = training.convolve(
            *(x, source.scale_shift, source.relu, weight, packed, bias, layer.stride, layer.padding),
            moments=layer.batch_statistics,
        )
        stats, affine = torch.empty(2, 0, device=x.device), None
        if partial is not None:
            stats, affine = finalize.finalize_stats(partial, gamma, beta, layer.eps, running)
        elif layer.normalized and mean is not None and var is not None:
            stats, affine = finalize.finalize_affine(mean, var, gamma, beta, layer.eps)
        return y, stats, affine, None if packed is weight else packed

    def affine(self, layer: Layer, stats: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        return finalize.finalize_affine(stats[0], stats[1], _dense(gamma), _dense(beta), layer.eps)[1]

    def apply(self, value: Value, residual: Value | None = None) -> Tensor:
        added, affine = (None, None) if residual is None else residual[:2]
        return training.bn_apply(value.tensor, value.scale_shift, added, affine, value.relu)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return training.bn_apply(a, None, b, None, False)

    def bn_backward_reduce(
        self, grad: Tensor, relu_source: Tensor | None, affine: Tensor | None, ys: list[Tensor], stats: list[Tensor]
    ) -> tuple[Tensor, Any]:
        out, partial = training.sums(grad, relu_source, affine, ys, stats)
        return out, _PartialSums(partial)

    def bias_reduce(self, grad: Tensor) -> Any:
        return self.bn_backward_reduce(grad, None, None, [], [])[1]

    def second_reduction(self, sums: Any) -> Any:
        return sums._replace(row=2)

    def gradients(
        self, layers: list[Layer], pixels: list[int], stats: list[Tensor], tensors: list[Tensor | None], needed: Any
    ) -> Gradients:
        return _GpuGradients(layers, pixels, stats, tensors)

    def backward(
        self,
        layer: Layer,
        grad: Tensor,
        y: Tensor | None,
        coefficients: Tensor | None,
        source: Value,
        weight: Tensor,
        filters: Tensor | None,
        needs: tuple[bool, bool],
        residual: Tensor | None,
        finish: bool,
        ys: list[Tensor],
        stats: list[Tensor],
    ) -> tuple[Tensor | None, Tensor | None, Any]:
        dx, dw, partial = training.gradients(
            *(grad, y, coefficients, *source, weight, filters, layer.stride, layer.padding),
            *(*needs, residual, finish, ys, stats),
        )
        return dx, dw, None if partial is None else _PartialSums(partial)


class _GpuGradients(Gradients):
    """One launch a layer, which also reduces the partial sums."""

    def __init__(
        self, layers: list[Layer], pixels: list[int], stats: list[Tensor], tensors: list[Tensor | None]
    ) -> None:
        self.layers, self.pixels, self.stats, self.tensors = layers, pixels, stats, tensors

    def of_layer(
        self, i: int, sums: Any, needs: Sequence[bool]
    ) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None, Tensor | None]]:
        layer, vectors = self.layers[i], [self._tensor(i, k) for k in (1, 2, 3)]
        into = [
            t.new_empty(t.shape) if need and t is not None else None for need, t in zip(needs, vectors, strict=True)
        ]
        coefficients = finalize.finalize_gradients(
            *(sums.partial, sums.row, self.pixels[i], self.stats[i] if layer.normalized else None, layer.eps),
            *(layer.batch_statistics, _dense(vectors[1]), (into[0], into[1], into[2])),
        )
        return coefficients if layer.normalized else None, (into[0], into[1], into[2])

    def rest(self) -> tuple[()]:
        return ()


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


GPU = _GpuKernels()


class ReplayedPasses:
    """Forward and backward of a chain: the first pass of a kind runs, the second is recorded, the rest replayed."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        self.tapes = Tapes(closed=True)
        self._outputs: dict[tuple[Any, ...], list[int | None]] = {}  # by kind: the tape's output for each result

    def forward(
        self, x: Tensor, tensors: list[Tensor | None], recompute: bool, running: Sequence[Any]
    ) -> tuple[Tensor, SavedTensors]:
        def run() -> list[Tensor | None]:
            out, saved = forward(GPU, self.layers, x, tensors, recompute, running)
            return [out, *(t for each in saved for t in each)]

        updated = [t for r in running for t in (r or (None,) * 4)]
        out, *rest = self._run([x, *tensors, *updated], ("forward", recompute), run)
        assert out is not None
        count = len(self.layers)
        lists: Any = [rest[i * count : (i + 1) * count] for i in range(SAVED)]
        return out, SavedTensors(*lists)

    def backward(
        self, x: Tensor, saved: SavedTensors, tensors: list[Tensor | None], needs: Sequence[bool], grad: Tensor
    ) -> list[Tensor | None]:
        flat, grad = [t for each in saved for t in each], dense(grad.to(x.dtype))

        def run() -> list[Tensor | None]:
            count = len(self.layers)
            own: Any = [flat[i * count : (i + 1) * count] for i in range(SAVED)]
            return ChainBackward(GPU, self.layers, x, SavedTensors(*own), tensors, needs).gradients(grad)

        return self._run([grad, x, *tensors, *flat], ("backward", *needs), run)

    def _run(
        self, inputs: Sequence[Tensor | None], kind: tuple[Any, ...], run: Callable[[], list[Tensor | None]]
    ) -> list[Tensor | None]:
        """``run()``; among its inputs and results some may be None, and some the same tensor."""
        given = [t for t in inputs if t is not None]
        present = tuple(map(is_not, inputs, repeat(None)))
        kind = (*kind, present, backends.selected(), precision(given[0].dtype), forced())

        def distinct() -> list[Tensor]:
            results = run()
            unique = {id(t): t for t in results if t is not None}
            numbers = {key: number for number, key in enumerate(unique)}
            self._outputs[kind] = [None if t is None else numbers[id(t)] for t in results]
            return list(unique.values())

        outputs = self.tapes.run_all(given, kind, distinct)
        return [None if number is None else outputs[number] for number in self._outputs[kind]]

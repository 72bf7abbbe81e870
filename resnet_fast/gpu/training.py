"""Training of a chain on a GPU: kernels alone, no operator of PyTorch's between them, and passes replayed from C++.

What PyTorch's operators do elsewhere between convolutions, for a few numbers a channel, is done by the kernels that end
the sums (:mod:`resnet_fast._triton.finalize`): a pass is then a list of launches that depends on shapes alone.
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


class _Sums(NamedTuple):
    """First step of the sums of gradients; those with y are in ``row``."""

    partial: Tensor  # [parts, rows, C]
    row: int = 1


class _GpuKernels(Kernels):
    """The Triton kernels, and the library's convolutions where they are faster."""

    def convolve(
        self, layer: Layer, source: Value, tensors: Sequence[Tensor | None], running: Any = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        weight, *vectors = tensors
        assert weight is not None
        bias, gamma, beta, mean, var = map(_dense, vectors)
        x = source.tensor
        packed = filters.packed(weight, x.dtype)
        y, stats = training.convolve(
            *(x, source.scale_shift, source.relu, weight, packed, bias, layer.stride, layer.padding),
            moments=layer.batch_statistics,
        )
        moments, affine = torch.empty(2, 0, device=x.device), None
        if stats is not None:
            moments, affine = finalize.stats(stats, gamma, beta, layer.eps, running)
        elif layer.normalized and mean is not None and var is not None:
            moments, affine = finalize.affine(mean, var, gamma, beta, layer.eps)
        return y, moments, affine, None if packed is weight else packed

    def affine(self, layer: Layer, moments: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        return finalize.affine(moments[0], moments[1], _dense(gamma), _dense(beta), layer.eps)[1]

    def apply(self, value: Value, residual: Value | None = None) -> Tensor:
        added, affine = (None, None) if residual is None else residual[:2]
        return training.bn_apply(value.tensor, value.scale_shift, added, affine, value.relu)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return training.bn_apply(a, None, b, None, False)

    def sums(
        self, grad: Tensor, positive: Tensor | None, affine: Tensor | None, ys: list[Tensor], moments: list[Tensor]
    ) -> tuple[Tensor, Any]:
        out, partial = training.sums(grad, positive, affine, ys, moments)
        return out, _Sums(partial)

    def bias_sums(self, grad: Tensor) -> Any:
        return self.sums(grad, None, None, [], [])[1]

    def second(self, sums: Any) -> Any:
        return sums._replace(row=2)

    def gradients(
        self, layers: list[Layer], pixels: list[int], moments: list[Tensor], tensors: list[Tensor | None], needed: Any
    ) -> Gradients:
        return _GpuGradients(layers, pixels, moments, tensors)

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
        moments: list[Tensor],
    ) -> tuple[Tensor | None, Tensor | None, Any]:
        dx, dw, partial = training.gradients(
            *(grad, y, coefficients, *source, weight, filters, layer.stride, layer.padding),
            *(*needs, residual, finish, ys, moments),
        )
        return dx, dw, None if partial is None else _Sums(partial)


class _GpuGradients(Gradients):
    """A launch a layer, which ends the sums, too."""

    def __init__(
        self, layers: list[Layer], pixels: list[int], moments: list[Tensor], tensors: list[Tensor | None]
    ) -> None:
        self.layers, self.pixels, self.moments, self.tensors = layers, pixels, moments, tensors

    def of_layer(
        self, i: int, sums: Any, needs: Sequence[bool]
    ) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None, Tensor | None]]:
        layer, vectors = self.layers[i], [self._tensor(i, k) for k in (1, 2, 3)]
        into = [
            t.new_empty(t.shape) if need and t is not None else None for need, t in zip(needs, vectors, strict=True)
        ]
        coefficients = finalize.gradients(
            *(sums.partial, sums.row, self.pixels[i], self.moments[i] if layer.normalized else None, layer.eps),
            *(layer.batch_statistics, _dense(vectors[1]), (into[0], into[1], into[2])),
        )
        return coefficients if layer.normalized else None, (into[0], into[1], into[2])

    def rest(self) -> tuple[()]:
        return ()


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


GPU = _GpuKernels()


class ReplayedPasses:
    """Forward and backward passes of a chain: each kind runs as it is, is recorded, and is replayed from then on."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        self.tapes = Tapes(closed=True)
        self._places: dict[tuple[Any, ...], list[int | None]] = {}

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
        """``run()``, of whose tensors some may be the same, and some None."""
        given = [t for t in inputs if t is not None]
        present = tuple(map(is_not, inputs, repeat(None)))
        kind = (*kind, present, backends.selected(), precision(given[0].dtype), forced())

        def different() -> list[Tensor]:
            results = run()
            found = {id(t): t for t in results if t is not None}
            numbers = {key: number for number, key in enumerate(found)}
            self._places[kind] = [None if t is None else numbers[id(t)] for t in results]
            return list(found.values())

        outputs = self.tapes.run_all(given, kind, different)
        return [None if place is None else outputs[place] for place in self._places[kind]]

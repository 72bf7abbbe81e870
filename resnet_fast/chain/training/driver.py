"""Forward and backward of a chain of convolutions and batch norms on the kernels of training, without autograd.

Each batch norm is left as a scale and a shift of its convolution's output ``y``, applied where ``y`` is next read. So
the normalised activations between two convolutions are never written, and the backward recomputes them. Kept for it are
the chain's input, every ``y``, the sums of the residual connections and the statistics.

    forward    y_i = conv_i(relu(scale * y_j + shift)), mean and variance of y_i taken as it is written
    backward   dy = a * g + b * (y - mean) + c per channel, as it is read; g = the gradient behind the ReLU, and its
               sums as it is written

Source: the restructuring of batch norm by Jung et al., "Restructuring Batch Normalization to Accelerate CNN Training",
2018 (fission into statistics and normalisation, each fused with a neighbour); the gradient in Ioffe and Szegedy 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

from torch import Tensor

from .kernels import Kernels
from .layers import TENSORS, Layer, SavedTensors, Value, counts, dense

__all__ = ["ChainBackward", "forward"]


def forward(
    kernels: Kernels,
    layers: list[Layer],
    x: Tensor,
    tensors: list[Tensor | None],
    recompute: bool,
    running: Sequence[Any] = (),
) -> tuple[Tensor, SavedTensors]:
    """The result of a chain, and what :class:`ChainBackward` wants; with ``recompute`` that forms the residual sums
    again. ``x``: channels_last. ``tensors``: TENSORS a layer. ``running``: of each layer what ``kernels`` are to
    update."""
    values: dict[int, Value] = {0: Value(x)}
    saved = SavedTensors([], [], [], [], [])
    last_reader = {value: i for i, layer in enumerate(layers) for value in (layer.source, layer.residual)}
    for i, layer in enumerate(layers):
        own = tensors[TENSORS * i : TENSORS * (i + 1)]
        y, moments, affine, filters = kernels.convolve(
            layer, values[layer.source], own, running[i] if running else None
        )
        value = Value(y, affine, layer.relu)
        if layer.residual >= 0:
            value = Value(kernels.apply(value, _addable(kernels, values[layer.residual])))
        values[i + 1] = value
        for read in {layer.source, layer.residual} - {-1}:
            if last_reader[read] == i:
                del values[read]
        unread = i + 1 == len(layers) and not layer.normalized
        total = None if value.scale_shift is not None else value.tensor
        if unread or (recompute and layer.residual >= 0):
            total = None
        saved.ys.append(None if unread else y)
        saved.sums.append(total)
        saved.scales.append(value.scale_shift)
        saved.moments.append(moments)
        saved.filters.append(filters)
    last = values[len(layers)]
    return (last.tensor if last.scale_shift is None else kernels.apply(last)), saved


def _addable(kernels: Kernels, value: Value) -> Value:
    """A value that a sum may read: one with a ReLU to come is written out first."""
    return Value(kernels.apply(value)) if value.scale_shift is not None and value.relu else value


class ChainBackward:
    """One backward of a chain. Values are numbered as in the chain; ``value - 1`` is the layer that gives it."""

    def __init__(
        self,
        kernels: Kernels,
        layers: list[Layer],
        x: Tensor,
        saved: SavedTensors,
        tensors: list[Tensor | None],
        needs: Sequence[bool],
    ) -> None:
        """``needs``: whether the gradient of x, and of each of ``tensors``, is wanted. Empties ``saved``, of which
        scales and filters need not be there."""
        self.kernels, self.layers, self.x, self.tensors, self.needs = kernels, layers, x, tensors, needs
        self.ys, self.sums, self.scales, self.moments, self.filters = saved
        self.pending: dict[int, Tensor] = {}
        self.finished: dict[int, tuple[Tensor, Any]] = {}
        self.readers: dict[int, list[int]] = {}
        needed = [needs[0]]
        for i, layer in enumerate(layers):
            inputs = {layer.source, layer.residual} - {-1}
            for value in inputs:
                self.readers.setdefault(value, []).append(i)
            own = needs[1 + TENSORS * i : 1 + TENSORS * i + 4]
            needed.append(any(own) or any(needed[value] for value in inputs))
        self.needed = needed
        self.missing = {i for i, layer in enumerate(layers) if layer.residual >= 0 and self.sums[i] is None}
        for i, layer in enumerate(layers):
            if self.scales[i] is None and layer.normalized and layer.residual < 0:
                self.scales[i] = kernels.affine(layer, self.moments[i], *tensors[TENSORS * i + 2 : TENSORS * i + 4])
        self.segments = self._segments()
        self._restore_ends()
        self.vectors = kernels.gradients(layers, counts(layers, x.shape), self.moments, tensors, needed[1:])
        self.found: list[Tensor | None] = [None] * len(needs)

    def _segments(self) -> dict[int, int]:
        """The first layer of each segment by its last one, from front to back. Sums that were not kept are formed again
        a segment at a time, when the backward pass comes there: of n sums no more than some 2 sqrt(n) exist at once
        (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost")."""
        ends, nearest = [], len(self.layers)
        for i, layer in reversed(list(enumerate(self.layers))):
            # A segment ends with a sum if the layers behind it read nothing that lies before.
            if i in self.missing and nearest > i:
                ends.append(i)
            nearest = min(nearest, layer.source, layer.residual if layer.residual >= 0 else nearest)
        step = max(1, round(sqrt(len(ends))))
        lasts = sorted({len(self.layers) - 1, *ends[::step]})
        return dict(zip(lasts, [0, *(last + 1 for last in lasts)], strict=False))

    def _restore_ends(self) -> None:
        """The last sum of each segment but the last, from which the others can be formed again."""
        for last, first in list(self.segments.items())[:-1]:
            self._restore(first, last)
            for i in self.missing.intersection(range(first, last)):
                self.sums[i] = None

    def _restore(self, first: int, last: int) -> None:
        """The residual sums of layers ``first`` to ``last`` that are not there, as the forward pass formed them."""
        for i in range(first, last + 1):
            layer = self.layers[i]
            if self.sums[i] is None and layer.residual >= 0:
                gamma, beta = self.tensors[TENSORS * i + 2 : TENSORS * i + 4]
                value = Value(self._y(i), self.kernels.affine(layer, self.moments[i], gamma, beta), layer.relu)
                self.sums[i] = self.kernels.apply(value, _addable(self.kernels, self._value(layer.residual)))

    def _value(self, value: int) -> Value:
        if value == 0:
            return Value(self.x)
        i = value - 1
        total = self.sums[i]
        return Value(self._y(i) if total is None else total, self.scales[i], self.layers[i].relu)

    def gradients(self, grad: Tensor) -> list[Tensor | None]:
        """Of x and of ``tensors``, None where they are not needed; ``grad``: of the chain's result."""
        self.pending[len(self.layers)] = dense(grad.to(self.x.dtype))
        for i in reversed(range(len(self.layers))):
            first = self.segments.get(i, i + 1)
            if any(self.needed[first + 1 : i + 2]):
                self._restore(first, i)
            if self.needed[i + 1]:
                self._layer(i)
            self.ys[i] = self.sums[i] = None
        self.found[0] = self.pending.get(0)
        for i, gradient in self.vectors.rest():
            self.found[1 + TENSORS * i + 2] = gradient
        return self.found

    def _projection(self, i: int) -> int | None:
        """The layer whose normalised output layer ``i`` adds, if nobody else reads it: they share their sums."""
        residual = self.layers[i].residual
        lazy = residual > 0 and self.scales[residual - 1] is not None and not self.layers[residual - 1].relu
        return residual - 1 if lazy and self.readers[residual] == [i] else None

    def _sum_inputs(self, value: int) -> tuple[list[Tensor], list[Tensor]]:
        i = value - 1
        read = [i] if self.layers[i].normalized else []
        projection = self._projection(i)
        if projection is not None:
            read.append(projection)
        return [self._y(j) for j in read], [self.moments[j] for j in read]

    def _y(self, i: int) -> Tensor:
        y = self.ys[i]
        assert y is not None
        return y

    def _finish(self, value: int) -> tuple[Tensor, Any]:
        """The gradient behind the ReLU of a value, and its sums."""
        if value in self.finished:
            return self.finished.pop(value)
        i = value - 1
        grad, positive, scale = self.pending.pop(value), None, None
        if not self.layers[i].normalized and not self.layers[i].relu:  # only a bias wants the sum, if there is one
            return grad, self.kernels.bias_sums(grad) if self.needs[2 + TENSORS * i] else None
        if self.layers[i].relu:
            lazy = self.scales[i] is not None
            positive, scale = (self.ys[i], self.scales[i]) if lazy else (self.sums[i], None)
        return self.kernels.sums(grad, positive, scale, *self._sum_inputs(value))

    def _layer(self, i: int) -> None:
        layer, at = self.layers[i], 1 + TENSORS * i
        need_weight, *need_vectors = self.needs[at : at + 4]
        grad, sums = self._finish(i + 1)
        if layer.residual >= 0 and self.needed[layer.residual]:
            self._to_residual(i, grad, sums)
        coefficients = None
        if sums is not None:
            coefficients, self.found[at + 1 : at + 4] = self.vectors.of_layer(i, sums, need_vectors)
        need_x = self.needed[layer.source]
        if need_x or need_weight:
            self.found[at] = self._convolution(i, grad, coefficients, need_x, need_weight)

    def _to_residual(self, i: int, grad: Tensor, sums: Any) -> None:
        value, projection = self.layers[i].residual, self._projection(i)
        if projection is not None:
            self.finished[value] = (grad, self.kernels.second(sums))
        elif value in self.pending:
            self.pending[value] = self.kernels.add(self.pending[value], grad)
        else:
            self.pending[value] = grad

    def _convolution(
        self, i: int, grad: Tensor, coefficients: Tensor | None, need_x: bool, need_weight: bool
    ) -> Tensor | None:
        """Adds to what is pending for the layer's input, or finishes it; returns the gradient of the weight."""
        layer, value, weight = self.layers[i], self.layers[i].source, self.tensors[TENSORS * i]
        lazy = value > 0 and self.scales[value - 1] is not None
        x = self.x if value == 0 else self.ys[value - 1] if lazy else self.sums[value - 1]
        assert x is not None
        assert weight is not None
        relu = value > 0 and self.layers[value - 1].relu
        last = need_x and value > 0 and self.readers[value][0] == i and self.layers[value - 1].normalized
        dx, dw, sums = self.kernels.backward(
            layer,
            grad,
            None if coefficients is None else self.ys[i],
            coefficients,
            Value(x, self.scales[value - 1] if lazy else None, relu and lazy),
            weight,
            self.filters[i],
            (need_x, need_weight),
            self.pending.pop(value, None) if need_x else None,
            last,
            *(self._sum_inputs(value) if last else ([], [])),
        )
        if dx is not None and last:
            self.finished[value] = (dx, sums)
        elif dx is not None:
            self.pending[value] = dx
        return dw

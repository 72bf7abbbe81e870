"""Chain training: forward and backward of a chain of convolutions and batch norms on training kernels, no autograd.

    forward    y_i = conv_i(relu(scale * y_j + shift)); its epilogue reduces y_i to mean and variance
    backward   dy = a * g + b * (y - mean) + c per channel, applied as dy is read; g = the gradient behind the ReLU,
               reduced to its per-channel sums as it is written

Each batch norm becomes a scale and a shift of its convolution's output ``y``, applied in the prologue of whatever reads
``y`` next. The normalised activation between two convolutions is never written; the backward recomputes it. Saved are
the chain's input, every ``y``, the residual sums and the statistics.

:class:`.passes.Passes` calls :func:`forward` and :class:`ChainBackward` with the kernels of a device.

Source: Jung et al., "Restructuring Batch Normalization to Accelerate CNN Training", 2018 (batch norm split into
statistics and normalisation, each fused with a neighbour); the gradient in Ioffe and Szegedy 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

from torch import Tensor

from .kernels import Kernels
from .layers import TENSORS, Layer, SavedTensors, Value, block_ends, counts, dense

__all__ = ["ChainBackward", "forward"]


def forward(
    kernels: Kernels,
    layers: list[Layer],
    x: Tensor,
    tensors: list[Tensor | None],
    recompute: bool,
    running: Sequence[Any] = (),
) -> tuple[Tensor, SavedTensors]:
    """The result of a chain, and what :class:`ChainBackward` needs.

    x: channels_last. tensors: TENSORS a layer. recompute: save no residual sums; the backward recomputes them. running:
    for each layer, the running statistics that ``kernels`` update.
    """
    values: dict[int, Value] = {0: Value(x)}
    saved, synced = SavedTensors([], [], [], [], [], []), kernels.statistics()

    def ready(value: int) -> Value:
        """A value; the first time, with the statistics of all processes if its batch norm is synchronised."""
        i = value - 1
        if value > 0 and layers[i].synced and saved.counts[i] is None:
            saved.counts[i], saved.stats[i] = synced.wait(i)
            affine = kernels.affine(layers[i], saved.stats[i], *tensors[TENSORS * i + 2 : TENSORS * i + 4])
            saved.scales[i], values[value] = affine, values[value]._replace(scale_shift=affine)
        return values[value]

    last_reader = {value: i for i, layer in enumerate(layers) for value in (layer.source, layer.residual)}
    for i, layer in enumerate(layers):
        own = tensors[TENSORS * i : TENSORS * (i + 1)]
        y, stats, affine, filters = kernels.convolve(layer, ready(layer.source), own, running[i] if running else None)
        values[i + 1] = Value(y, affine, layer.relu)
        unread = i + 1 == len(layers) and not layer.normalized
        saved.ys.append(None if unread else y)
        saved.sums.append(None)
        saved.scales.append(affine)
        saved.stats.append(stats)
        saved.filters.append(filters)
        saved.counts.append(None)
        if layer.synced:
            synced.add(i, stats, y.numel() // y.shape[1])
        if layer.residual >= 0:
            values[i + 1] = Value(kernels.apply(ready(i + 1), _addable(kernels, ready(layer.residual))))
            saved.scales[i] = None
        if not unread and not (recompute if layer.residual >= 0 else layer.normalized):
            saved.sums[i] = values[i + 1].tensor
        for read in {layer.source, layer.residual} - {-1}:
            if last_reader[read] == i:
                del values[read]
    for value in list(values):  # the last, and any that no layer reads
        ready(value)
    last = values[len(layers)]
    return (last.tensor if last.scale_shift is None else kernels.apply(last)), saved


def _addable(kernels: Kernels, value: Value) -> Value:
    """A value that a residual sum can read: one whose ReLU is still to be applied is written out first."""
    return Value(kernels.apply(value)) if value.scale_shift is not None and value.relu else value


class ChainBackward:
    """One backward of a chain. Values are numbered as in the chain; layer ``value - 1`` computes ``value``."""

    def __init__(
        self,
        kernels: Kernels,
        layers: list[Layer],
        x: Tensor,
        saved: SavedTensors,
        tensors: list[Tensor | None],
        needs: Sequence[bool],
    ) -> None:
        """needs: whether the gradient of x, and of each of ``tensors``, is wanted. Empties ``saved`` as it goes; scales
        and filters may be missing from it."""
        self.kernels, self.layers, self.x, self.tensors, self.needs = kernels, layers, x, tensors, needs
        self.ys, self.sums, self.scales, self.stats, self.filters, synced = saved
        self.pending: dict[int, Tensor] = {}  # gradients of values, as far as accumulated
        self.masked: dict[int, tuple[Tensor, Any]] = {}  # the gradient behind a value's ReLU, and its reductions
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
                self.scales[i] = kernels.affine(layer, self.stats[i], *tensors[TENSORS * i + 2 : TENSORS * i + 4])
        self.segments = self._segments()
        self._restore_ends()
        pixels = [own if n is None else n for own, n in zip(counts(layers, x.shape), synced, strict=True)]
        self.vectors = kernels.gradients(layers, pixels, self.stats, tensors, needed[1:])
        self.grads: list[Tensor | None] = [None] * len(needs)

    def _segments(self) -> dict[int, int]:
        """The first layer of each segment, by its last layer, front to back.

        The backward recomputes the residual sums that were not saved a segment at a time: of n sums about 2 sqrt(n)
        exist at once (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
        """
        ends = [i for i in block_ends(self.layers) if i in self.missing]
        step = max(1, round(sqrt(len(ends))))
        lasts = sorted({len(self.layers) - 1, *ends[::step]})
        return dict(zip(lasts, [0, *(last + 1 for last in lasts)], strict=False))

    def _restore_ends(self) -> None:
        """Recomputes the residual sum at the end of each segment but the last: the input of the segment after it."""
        for last, first in list(self.segments.items())[:-1]:
            self._restore(first, last)
            for i in self.missing.intersection(range(first, last)):
                self.sums[i] = None

    def _restore(self, first: int, last: int) -> None:
        """Recomputes the missing residual sums of layers ``first`` to ``last``, bit for bit as in the forward."""
        for i in range(first, last + 1):
            layer = self.layers[i]
            if self.sums[i] is None and layer.residual >= 0:
                gamma, beta = self.tensors[TENSORS * i + 2 : TENSORS * i + 4]
                value = Value(self._y(i), self.kernels.affine(layer, self.stats[i], gamma, beta), layer.relu)
                self.sums[i] = self.kernels.apply(value, _addable(self.kernels, self._value(layer.residual)))

    def _value(self, value: int) -> Value:
        if value == 0:
            return Value(self.x)
        i = value - 1
        total = self.sums[i]
        return Value(self._y(i) if total is None else total, self.scales[i], self.layers[i].relu)

    def gradients(self, grad: Tensor) -> list[Tensor | None]:
        """Gradients of x and of ``tensors``, None where not needed; ``grad``: that of the chain's result."""
        self.pending[len(self.layers)] = dense(grad.to(self.x.dtype))
        for i in reversed(range(len(self.layers))):
            first = self.segments.get(i, i + 1)
            if any(self.needed[first + 1 : i + 2]):
                self._restore(first, i)
            if self.needed[i + 1]:
                self._layer(i)
            self.ys[i] = self.sums[i] = None
        self.grads[0] = self.pending.get(0)
        for i, gradient in self.vectors.rest():
            self.grads[1 + TENSORS * i + 2] = gradient
        return self.grads

    def _projection(self, i: int) -> int | None:
        """The layer whose normalised output layer ``i`` adds, if no other layer reads it: they share reductions."""
        residual = self.layers[i].residual
        lazy = residual > 0 and self.scales[residual - 1] is not None and not self.layers[residual - 1].relu
        return residual - 1 if lazy and self.readers[residual] == [i] else None

    def _reduction_inputs(self, value: int) -> tuple[list[Tensor], list[Tensor]]:
        """The ys that a value's gradient is multiplied with and reduced, and their statistics."""
        i = value - 1
        read = [i] if self.layers[i].normalized else []
        projection = self._projection(i)
        if projection is not None:
            read.append(projection)
        return [self._y(j) for j in read], [self.stats[j] for j in read]

    def _y(self, i: int) -> Tensor:
        y = self.ys[i]
        assert y is not None
        return y

    def _masked_gradient(self, value: int) -> tuple[Tensor, Any]:
        """The gradient behind the ReLU of a value, and its reductions."""
        if value in self.masked:
            return self.masked.pop(value)
        i = value - 1
        grad, relu_source, affine = self.pending.pop(value), None, None
        if not self.layers[i].normalized and not self.layers[i].relu:  # only a bias needs the reduction, if any
            return grad, self.kernels.bias_reduce(grad) if self.needs[2 + TENSORS * i] else None
        if self.layers[i].relu:
            lazy = self.scales[i] is not None
            relu_source, affine = (self.ys[i], self.scales[i]) if lazy else (self.sums[i], None)
        return self.kernels.bn_backward_reduce(grad, relu_source, affine, *self._reduction_inputs(value))

    def _layer(self, i: int) -> None:
        layer, at = self.layers[i], 1 + TENSORS * i
        need_weight, *need_vectors = self.needs[at : at + 4]
        grad, sums = self._masked_gradient(i + 1)
        if layer.residual >= 0 and self.needed[layer.residual]:
            self._to_residual(i, grad, sums)
        coefficients = None
        if sums is not None:
            coefficients, self.grads[at + 1 : at + 4] = self.vectors.of_layer(i, sums, need_vectors)
        need_x = self.needed[layer.source]
        if need_x or need_weight:
            self.grads[at] = self._convolution(i, grad, coefficients, need_x, need_weight)

    def _to_residual(self, i: int, grad: Tensor, sums: Any) -> None:
        value, projection = self.layers[i].residual, self._projection(i)
        if projection is not None:
            self.masked[value] = (grad, self.kernels.second_reduction(sums))
        elif value in self.pending:
            self.pending[value] = self.kernels.add(self.pending[value], grad)
        else:
            self.pending[value] = grad

    def _convolution(
        self, i: int, grad: Tensor, coefficients: Tensor | None, need_x: bool, need_weight: bool
    ) -> Tensor | None:
        """Accumulates the gradient of the layer's input, and masks it if complete; returns that of the weight."""
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
            *(self._reduction_inputs(value) if last else ([], [])),
        )
        if dx is not None and last:
            self.masked[value] = (dx, sums)
        elif dx is not None:
            self.pending[value] = dx
        return dw

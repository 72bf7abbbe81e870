"""Training: a chain of convolutions and batch norms as one autograd function.

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

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import ops
from .choose import training_algorithm

__all__ = ["Program"]


class _Value(NamedTuple):
    """A chain's input or a layer's result: a tensor, or a convolution's output that is normalised where it is read."""

    tensor: Tensor
    scale_shift: Tensor | None = None
    relu: bool = False


@dataclass(frozen=True)
class _Layer:
    """A convolution with its batch norm, and what the forward and the backward must know of them beside tensors."""

    source: int
    residual: int
    relu: bool
    stride: list[int]
    padding: list[int]
    eps: float
    normalized: bool
    batch_statistics: bool


class Program:
    """The chain that a recorder wrote down, to be run in training mode.

    Raises:
        ValueError: a batch norm would have a single value per channel, as PyTorch raises it.
    """

    def __init__(self, pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d | None]], layers: list[int]) -> None:
        self.pairs = pairs
        self.layers = []
        for i, (_, bn) in enumerate(pairs):
            source, residual, relu, _, _, _, *sizes = layers[i * ops.LAYER_FIELDS : (i + 1) * ops.LAYER_FIELDS]
            batch = bn is not None and (bn.training or bn.running_mean is None)
            eps = 0.0 if bn is None else bn.eps
            self.layers.append(_Layer(source, residual, bool(relu), sizes[:2], sizes[2:], eps, bn is not None, batch))

    def reason(self) -> str | None:
        """Why the chain cannot be run, or None."""
        for layer in self.layers:
            if layer.relu and not layer.normalized:
                return "a ReLU without batch norm"
            if layer.residual >= 0 and not (layer.relu and layer.normalized):
                return "a sum without batch norm and ReLU"
        return None

    def run(self, x: Tensor) -> Tensor:
        tensors: list[Tensor | None] = []
        for (conv, bn), layer in zip(self.pairs, self.layers, strict=True):
            given = () if bn is None or layer.batch_statistics else (bn.running_mean, bn.running_var)
            gamma, beta = (None, None) if bn is None else (bn.weight, bn.bias)
            tensors += [conv.weight, conv.bias, gamma, beta, *(given or (None, None))]
        out, *moments = _Train.apply(self.layers, x, *tensors)
        self._track(x, moments)
        return out

    @torch.no_grad()
    def _track(self, x: Tensor, moments: list[Tensor]) -> None:
        """Running statistics, as ``nn.BatchNorm2d`` keeps them: the variance unbiased."""
        sizes = _counts(self.layers, x.shape, [conv.weight.shape for conv, _ in self.pairs])
        counters = []
        for (_, bn), layer, now, n in zip(self.pairs, self.layers, moments, sizes, strict=True):
            if bn is None or not layer.batch_statistics or bn.running_mean is None or not bn.track_running_stats:
                continue
            assert bn.running_var is not None
            counters.append(bn.num_batches_tracked)
            momentum = bn.momentum
            if momentum is None:
                assert bn.num_batches_tracked is not None
                momentum = 1.0 / (float(bn.num_batches_tracked) + 1)
            bn.running_mean.mul_(1 - momentum).add_(now[0].to(bn.running_mean.dtype), alpha=momentum)
            variance = now[1].to(bn.running_var.dtype)
            bn.running_var.mul_(1 - momentum).add_(variance, alpha=momentum * n / (n - 1))
        counted = [c for c in counters if c is not None]
        if counted:
            torch._foreach_add_(counted, 1)


def _counts(layers: list[_Layer], shape: torch.Size, weights: list[torch.Size]) -> list[int]:
    """Values per channel of each layer's output."""
    maps = [tuple(shape[2:])]
    for layer, weight in zip(layers, weights, strict=True):
        h, w = maps[layer.source]
        height = ops.conv_size(h, layer.padding[0], weight[2], layer.stride[0])
        maps.append((height, ops.conv_size(w, layer.padding[1], weight[3], layer.stride[1])))
    return [shape[0] * h * w for h, w in maps[1:]]


def _dense(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


class _Train(torch.autograd.Function):
    """``forward(layers, x, *six tensors a layer) -> (out, [mean; variance] of each layer)``"""

    @staticmethod
    def forward(ctx: Any, layers: list[_Layer], x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        x = _dense(x)
        values, ys, moments = [_Value(x)], [], []
        for i, layer in enumerate(layers):
            weight, bias, gamma, beta, mean, var = tensors[6 * i : 6 * i + 6]
            assert weight is not None
            source = values[layer.source]
            algorithm = training_algorithm(weight, layer.stride, source.tensor)
            y, statistics = torch.ops.resnet_fast.conv_moments(
                *source, weight, bias, layer.stride, layer.padding, algorithm, layer.batch_statistics
            )
            if mean is not None and var is not None:
                statistics = torch.stack((mean, var)).to(statistics.dtype)
            if layer.batch_statistics and y.numel() == y.shape[1]:
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.shape}")
            scale_shift = _scale_shift(statistics, gamma, beta, layer.eps) if layer.normalized else None
            value = _Value(y, scale_shift, layer.relu)
            if layer.residual >= 0:
                value = _Value(_apply(value, _readable(values, layer.residual)))
            values.append(value)
            ys.append(y)
            moments.append(statistics)
        out = _readable(values, len(layers), relu=True).tensor
        ctx.layers = layers
        ctx.is_sum = [value.scale_shift is None for value in values]
        sums = [value.tensor if value.scale_shift is None else None for value in values[1:]]
        scales = [value.scale_shift for value in values[1:]]
        ctx.dtype = out.dtype  # out itself may be changed in place, as behind a batch norm of PyTorch's
        ctx.save_for_backward(x, *ys, *sums, *scales, *moments, *tensors)
        ctx.mark_non_differentiable(*moments)
        return out, *moments

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        layers: list[_Layer] = ctx.layers
        count = len(layers)
        x, *saved = ctx.saved_tensors
        ys, sums, scales, moments = (saved[i * count : (i + 1) * count] for i in range(4))
        run = _Backward(layers, x, ys, sums, scales, moments, saved[4 * count :], ctx.needs_input_grad[1:])
        return None, *run.gradients(_dense(grad.to(ctx.dtype)))


def _scale_shift(moments: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    mean, var = moments.unbind(0)
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = scale * gamma.detach()
    shift = -mean * scale
    if beta is not None:
        shift = shift + beta.detach()
    return torch.stack((scale, shift)).to(moments.dtype)


def _apply(value: _Value, residual: _Value | None = None) -> Tensor:
    added, affine = (None, None) if residual is None else residual[:2]
    return torch.ops.resnet_fast.bn_apply(value.tensor, value.scale_shift, added, affine, value.relu)


def _readable(values: list[_Value], index: int, relu: bool = False) -> _Value:
    """A value to add, or with ``relu`` to return: lazy ones with a ReLU, or all, are written out first."""
    value = values[index]
    if value.scale_shift is not None and (value.relu or relu):
        return _Value(_apply(value))
    return value


class _Backward:
    """One backward of a chain. Values are numbered as in the chain; ``value - 1`` is the layer that gives it."""

    def __init__(
        self,
        layers: list[_Layer],
        x: Tensor,
        ys: list[Tensor],
        sums: list[Tensor | None],
        scales: list[Tensor | None],
        moments: list[Tensor],
        tensors: list[Tensor | None],
        needs: tuple[bool, ...],
    ) -> None:
        self.layers, self.x, self.ys, self.sums, self.scales = layers, x, ys, sums, scales
        self.moments, self.tensors, self.needs = moments, tensors, needs
        self.pending: dict[int, Tensor] = {}
        self.finished: dict[int, tuple[Tensor, Tensor]] = {}
        self.readers: dict[int, list[int]] = {}
        needed = [needs[0]]
        for i, layer in enumerate(layers):
            inputs = {layer.source, layer.residual} - {-1}
            for value in inputs:
                self.readers.setdefault(value, []).append(i)
            own = needs[1 + 6 * i : 1 + 6 * i + 4]
            needed.append(any(own) or any(needed[value] for value in inputs))
        self.needed = needed

    def gradients(self, grad: Tensor) -> list[Tensor | None]:
        self.pending[len(self.layers)] = grad
        found: list[Tensor | None] = [None] * len(self.needs)
        for i in reversed(range(len(self.layers))):
            if self.needed[i + 1] and (i + 1 in self.pending or i + 1 in self.finished):
                found[1 + 6 * i : 1 + 6 * i + 4] = self._layer(i)
        found[0] = self.pending.get(0)
        return found

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
        return [self.ys[j] for j in read], [self.moments[j] for j in read]

    def _finish(self, value: int) -> tuple[Tensor, Tensor]:
        """The gradient behind the ReLU of a value, and its sums."""
        if value not in self.finished:
            i = value - 1
            grad, positive, scale = self.pending.pop(value), None, None
            if self.layers[i].relu:
                lazy = self.scales[i] is not None
                positive, scale = (self.ys[i], self.scales[i]) if lazy else (self.sums[i], None)
            self.finished[value] = torch.ops.resnet_fast.bn_backward_sums(
                grad, positive, scale, *self._sum_inputs(value)
            )
        return self.finished[value]

    def _layer(self, i: int) -> list[Tensor | None]:
        layer = self.layers[i]
        weight, bias, gamma, beta = self.tensors[6 * i : 6 * i + 4]
        need_weight, need_bias, need_gamma, need_beta = self.needs[1 + 6 * i : 1 + 6 * i + 4]
        assert weight is not None
        grad, sums = self._finish(i + 1)
        del self.finished[i + 1]
        if layer.residual >= 0 and self.needed[layer.residual]:
            self._to_residual(i, grad, sums)
        coefficients, inv_std, grad_bias = None, None, sums[0]
        if layer.normalized:
            coefficients, inv_std, grad_bias = self._coefficients(i, sums, gamma)
        need_x = self.needed[layer.source]
        grad_weight = None
        if need_x or need_weight:
            grad_weight = self._convolution(i, grad, coefficients, weight, need_x, need_weight)
        return [
            grad_weight,
            grad_bias.to(bias.dtype) if need_bias and bias is not None else None,
            (sums[1] * inv_std).to(gamma.dtype) if need_gamma and gamma is not None and inv_std is not None else None,
            sums[0].to(beta.dtype) if need_beta and beta is not None else None,
        ]

    def _to_residual(self, i: int, grad: Tensor, sums: Tensor) -> None:
        value, projection = self.layers[i].residual, self._projection(i)
        if projection is not None:
            self.finished[value] = (grad, sums[[0, 2]])
        elif value in self.pending:
            self.pending[value] = self.pending[value] + grad
        else:
            self.pending[value] = grad

    def _coefficients(self, i: int, sums: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``a, b, constant, mean`` of ``dy = a * g + b * (y - mean) + constant``; 1 / std; the sum of dy."""
        mean, var = self.moments[i].unbind(0)
        inv_std = torch.rsqrt(var + self.layers[i].eps)
        a = inv_std if gamma is None else (inv_std * gamma).to(inv_std.dtype)
        zero = torch.zeros_like(a)
        if not self.layers[i].batch_statistics:
            return torch.stack((a, zero, zero, mean)), inv_std, a * sums[0]
        share = -a / (self.ys[i].numel() // self.ys[i].shape[1])
        b = share * inv_std.square() * sums[1]
        # A bias before batch norm by batch statistics moves the mean along: its gradient is zero.
        return torch.stack((a, b, share * sums[0], mean)), inv_std, zero

    def _convolution(
        self, i: int, grad: Tensor, coefficients: Tensor | None, weight: Tensor, need_x: bool, need_weight: bool
    ) -> Tensor | None:
        """Adds to what is pending for the layer's input, or finishes it; returns the gradient of the weight."""
        layer, value = self.layers[i], self.layers[i].source
        lazy = value > 0 and self.scales[value - 1] is not None
        x = self.x if value == 0 else self.ys[value - 1] if lazy else self.sums[value - 1]
        assert x is not None
        scale = self.scales[value - 1] if lazy else None
        relu = value > 0 and self.layers[value - 1].relu
        last = need_x and value > 0 and self.readers[value][0] == i and self.layers[value - 1].normalized
        dx, dw, sums = torch.ops.resnet_fast.conv_backward(
            grad,
            None if coefficients is None else self.ys[i],
            coefficients,
            x,
            scale,
            relu and lazy,
            weight,
            layer.stride,
            layer.padding,
            training_algorithm(weight, layer.stride, x, backward=True),
            need_x,
            need_weight,
            self.pending.pop(value, None) if need_x else None,
            last,
            *(self._sum_inputs(value) if last else ([], [])),
        )
        if last:
            self.finished[value] = (dx, sums)
        elif need_x:
            self.pending[value] = dx
        return dw if need_weight else None

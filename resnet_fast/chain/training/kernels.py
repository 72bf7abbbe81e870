"""What a chain in training asks of a device, on the operators that every device has.

Sums of gradients go from the method that gives them to :meth:`Gradients.of_layer` unseen: each device has them in a
form of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cpu_algorithm import training_algorithm
from .layers import Layer, Value

__all__ = ["Gradients", "Kernels"]


class Kernels:
    """The operators of training in ``kernels/csrc/ops.cpp``, and PyTorch's own for what is a few numbers a channel."""

    def convolve(
        self, layer: Layer, source: Value, tensors: Sequence[Tensor | None], running: Any = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The convolution's output; ``[mean; variance]`` of it, or those that are given; ``[scale; shift]`` of the
        batch norm behind it; the filters as :meth:`backward` may take them. ``tensors``: of the layer."""
        weight, bias, gamma, beta, mean, var = tensors
        assert weight is not None
        algorithm = training_algorithm(weight, layer.stride, source.tensor)
        y, moments = torch.ops.resnet_fast.conv_moments.default(
            *source, weight, bias, layer.stride, layer.padding, algorithm, layer.batch_statistics
        )
        if mean is not None and var is not None:
            moments = torch.stack((mean, var)).to(moments.dtype)
        affine = self.affine(layer, moments, gamma, beta) if layer.normalized else None
        return y, moments, affine, None

    def affine(self, layer: Layer, moments: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        """``[scale; shift]`` of batch norm with ``[mean; variance]``."""
        mean, var = moments.unbind(0)
        scale = (var + layer.eps).rsqrt_()
        if gamma is not None:
            scale = scale * gamma
        shift = -mean * scale if beta is None else torch.addcmul(beta, mean, scale, value=-1)
        return torch.stack((scale, shift)).to(moments.dtype)

    def apply(self, value: Value, residual: Value | None = None) -> Tensor:
        """``[relu](scale * value + shift [+ residual])``"""
        added, affine = (None, None) if residual is None else residual[:2]
        return torch.ops.resnet_fast.bn_apply.default(value.tensor, value.scale_shift, added, affine, value.relu)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def sums(
        self, grad: Tensor, positive: Tensor | None, affine: Tensor | None, ys: list[Tensor], moments: list[Tensor]
    ) -> tuple[Tensor, Any]:
        """``grad`` where the ReLU of ``[scale * ]positive[ + shift]`` let it pass; its sums, and those of
        ``grad * (y - mean)`` for each of up to two ys."""
        return torch.ops.resnet_fast.bn_backward_sums.default(grad, positive, affine, ys, moments)

    def bias_sums(self, grad: Tensor) -> Any:
        """The sums of ``grad`` alone."""
        return torch.ops.resnet_fast.channel_sums.default(grad).expand(2, -1)

    def second(self, sums: Any) -> Any:
        """The sums of a layer whose y was the second one."""
        return sums[::2].clone()  # gradients of two parameters: no alias

    def gradients(
        self, layers: list[Layer], pixels: list[int], moments: list[Tensor], tensors: list[Tensor | None], needed: Any
    ) -> Gradients:
        """Of one backward. needed: of each layer, whether the gradient of its output is."""
        return Gradients(layers, pixels, moments, tensors, needed)

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
        """Gradients of source and weight for ``a * grad + b * (y - mean) + constant``, as far as they are needed. To
        the first ``residual`` is added. With ``finish`` it goes on through :meth:`sums`, as what gave the source."""
        x, affine, relu = source
        need_x, need_weight = needs
        dx, dw, sums = torch.ops.resnet_fast.conv_backward.default(
            *(grad, y, coefficients, x, affine, relu, weight, layer.stride, layer.padding),
            training_algorithm(weight, layer.stride, x, True, need_x),
            *(need_x, need_weight, residual, finish, ys, moments),
        )
        return dx if need_x else None, dw if need_weight else None, sums


class Gradients:
    """Of bias, gamma and beta of each layer, and the coefficients ``[a; b; constant; mean]`` of
    ``dy = a * g + b * (y - mean) + constant``. They are begun for all layers in one call of each operator; b and the
    constant then lack the sums of g as a factor."""

    def __init__(
        self,
        layers: list[Layer],
        pixels: list[int],
        moments: list[Tensor],
        tensors: list[Tensor | None],
        needed: Sequence[bool],
    ) -> None:
        self.layers, self.tensors = layers, tensors
        self._gammas: list[tuple[int, Tensor, Tensor]] = []  # the layer, and the factors
        self.coefficients: dict[int, Tensor] = {}
        normalized = [i for i, layer in enumerate(layers) if layer.normalized and needed[i]]
        if not normalized:
            return
        means, variances = zip(*(moments[i].unbind(0) for i in normalized), strict=True)
        inv_std = torch._foreach_add(variances, [layers[i].eps for i in normalized])
        torch._foreach_rsqrt_(inv_std)
        gammas = [self._tensor(i, 2) for i in normalized]
        a = [s if g is None else (s * g).to(s.dtype) for s, g in zip(inv_std, gammas, strict=True)]
        # Batch norm by given statistics has no b and no constant.
        batch = [layers[i].batch_statistics for i in normalized]
        share = torch._foreach_mul(
            a, [-1.0 / pixels[i] if own else 0.0 for i, own in zip(normalized, batch, strict=True)]
        )
        b = torch._foreach_mul(share, inv_std)
        torch._foreach_mul_(b, inv_std)
        self.coefficients = {i: torch.stack(row) for i, *row in zip(normalized, a, b, share, means, strict=True)}
        self.inv_std = dict(zip(normalized, inv_std, strict=True))

    def _tensor(self, i: int, which: int) -> Tensor | None:
        return self.tensors[len(self.tensors) // len(self.layers) * i + which]

    def of_layer(
        self, i: int, sums: Any, needs: Sequence[bool]
    ) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """The coefficients, without batch norm None; the gradients of bias, gamma and beta that are needed, but for
        those of gamma, which are in :meth:`rest`."""
        of_g, of_gy, *_ = sums.unbind(0)
        coefficients, batch = self.coefficients.get(i), self.layers[i].batch_statistics
        if coefficients is not None and batch:
            coefficients[1].mul_(of_gy)
            coefficients[2].mul_(of_g)
        need_bias, need_gamma, need_beta = needs
        bias, gamma, beta = (self._tensor(i, k) for k in (1, 2, 3))
        of_bias = of_beta = None
        if need_bias and bias is not None:
            # A bias before batch norm by batch statistics moves the mean along: its gradient is zero.
            of_bias = of_g if coefficients is None else of_g * coefficients[0]
            of_bias = torch.zeros_like(bias) if batch else of_bias.to(bias.dtype)
        if need_gamma and gamma is not None:
            self._gammas.append((i, of_gy, self.inv_std[i]))
        if need_beta and beta is not None:
            of_beta = of_g.to(beta.dtype)
        return coefficients, (of_bias, None, of_beta)

    def rest(self) -> Iterable[tuple[int, Tensor]]:
        """Gradients of gamma that :meth:`of_layer` left, by layer, once all of them were asked for."""
        if not self._gammas:
            return
        layers, sums, inv_std = zip(*self._gammas, strict=True)
        for i, product in zip(layers, torch._foreach_mul(sums, inv_std), strict=True):
            gamma = self._tensor(i, 2)
            assert gamma is not None
            yield i, product.to(gamma.dtype)

"""The kernel interface of chain training, implemented on the operators that every device has.

:mod:`.driver` calls it; :mod:`resnet_fast.gpu.training` overrides it. Reductions of gradients are opaque to the driver,
which passes them on to :meth:`Gradients.of_layer`: each device has its own form of them.
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
    """The training operators of ``kernels/csrc/ops.cpp``, with PyTorch's own for the per-channel arithmetic."""

    def convolve(
        self, layer: Layer, source: Value, tensors: Sequence[Tensor | None], running: Any = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """``y = conv2d([relu](scale * source + shift), weight) + bias``.

        Returns:
            y; ``[mean; variance]``, of y or given; ``[scale; shift]`` of the batch norm of y; filters that
            :meth:`backward` can reuse, or None.
        """
        weight, bias, gamma, beta, mean, var = tensors
        assert weight is not None
        y, stats = self._convolve(layer, source, weight, bias, layer.batch_statistics)
        if mean is not None and var is not None:
            stats = torch.stack((mean, var)).to(stats.dtype)
        affine = self.affine(layer, stats, gamma, beta) if layer.normalized else None
        return y, stats, affine, None

    def _convolve(
        self, layer: Layer, source: Value, weight: Tensor, bias: Tensor | None, stats: bool
    ) -> tuple[Tensor, Tensor]:
        algorithm = training_algorithm(weight, layer.stride, source.tensor)
        return torch.ops.resnet_fast.conv_bn_stats.default(
            *source, weight, bias, layer.stride, layer.padding, algorithm, stats
        )

    def statistics(self) -> Any:
        """The :class:`.synchronized.Statistics` of one forward; None where a chain has no synchronised layers."""
        return None

    def affine(self, layer: Layer, stats: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        """``[scale; shift]`` of batch norm with ``stats`` = ``[mean; variance]``."""
        mean, var = stats.unbind(0)
        scale = (var + layer.eps).rsqrt_()
        if gamma is not None:
            scale = scale * gamma
        shift = -mean * scale if beta is None else torch.addcmul(beta, mean, scale, value=-1)
        return torch.stack((scale, shift)).to(stats.dtype)

    def apply(self, value: Value, residual: Value | None = None) -> Tensor:
        """``[relu](scale * value + shift [+ residual])``"""
        added, affine = (None, None) if residual is None else residual[:2]
        return torch.ops.resnet_fast.bn_apply.default(value.tensor, value.scale_shift, added, affine, value.relu)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def bn_backward_reduce(
        self, grad: Tensor, relu_source: Tensor | None, affine: Tensor | None, ys: list[Tensor], stats: list[Tensor]
    ) -> tuple[Tensor, Any]:
        """``g = grad * ([scale * ]relu_source[ + shift] > 0)``, and its reductions per channel.

        These are ``sum(g)``, and ``sum(g * (y - mean))`` for each of up to two ys.
        """
        return torch.ops.resnet_fast.bn_backward_reduce.default(grad, relu_source, affine, ys, stats)

    def bias_reduce(self, grad: Tensor) -> Any:
        """The reduction ``sum(grad)`` alone."""
        return torch.ops.resnet_fast.channel_sums.default(grad).expand(2, -1)

    def second_reduction(self, sums: Any) -> Any:
        """Reductions for the layer whose y was the second of the ys."""
        return sums[::2].clone()  # they become gradients of other parameters: no alias

    def gradients(
        self, layers: list[Layer], pixels: list[Any], stats: list[Tensor], tensors: list[Tensor | None], needed: Any
    ) -> Gradients:
        """The per-channel gradients of one backward. pixels: values per channel of each layer's output, a tensor where
        batch norm is synchronised. needed: whether the gradient of each layer's output is."""
        return Gradients(layers, pixels, stats, tensors, needed)

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
        reduce: bool,
        ys: list[Tensor],
        stats: list[Tensor],
    ) -> tuple[Tensor | None, Tensor | None, Any]:
        """Gradients of source and weight from ``dy = a * grad + b * (y - mean) + constant``, where ``needs`` says so.

        ``residual`` is added to the gradient of the source. With ``reduce``, that gradient is complete and goes on
        through :meth:`bn_backward_reduce` of the layer that computed the source.
        """
        x, affine, relu = source
        need_x, need_weight = needs
        dx, dw, sums = torch.ops.resnet_fast.conv_backward.default(
            *(grad, y, coefficients, x, affine, relu, weight, layer.stride, layer.padding),
            training_algorithm(weight, layer.stride, x, True, need_x),
            *(need_x, need_weight, residual, reduce, ys, stats),
        )
        return dx if need_x else None, dw if need_weight else None, sums


class Gradients:
    """Gradients of bias, gamma and beta, and the coefficients of ``dy = a * g + b * (y - mean) + constant``.

    ``coefficients[i]`` is ``[a; b; constant; mean]``. One call of each operator prepares all layers; b and the constant
    then lack one factor each, the reductions of g.
    """

    def __init__(
        self,
        layers: list[Layer],
        pixels: list[int],
        stats: list[Tensor],
        tensors: list[Tensor | None],
        needed: Sequence[bool],
    ) -> None:
        self.layers, self.tensors = layers, tensors
        self._gammas: list[tuple[int, Tensor, Tensor]] = []  # the layer, and the factors of its gradient
        self.coefficients: dict[int, Tensor] = {}
        normalized = [i for i, layer in enumerate(layers) if layer.normalized and needed[i]]
        if not normalized:
            return
        means, variances = zip(*(stats[i].unbind(0) for i in normalized), strict=True)
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
        """The coefficients, None without batch norm; and the needed gradients of bias, gamma and beta.

        sums: the layer's reductions. A gradient of gamma may be left to :meth:`rest`.
        """
        return self._complete(i, sums), self._vectors(i, sums, needs)

    def _complete(self, i: int, sums: Tensor) -> Tensor | None:
        """The coefficients, with the factors that they lack."""
        coefficients = self.coefficients.get(i)
        if coefficients is not None and self.layers[i].batch_statistics:
            coefficients[1].mul_(sums[1])
            coefficients[2].mul_(sums[0])
        return coefficients

    def _vectors(
        self, i: int, sums: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        of_g, of_gy, *_ = sums.unbind(0)
        coefficients, batch = self.coefficients.get(i), self.layers[i].batch_statistics
        need_bias, need_gamma, need_beta = needs
        bias, gamma, beta = (self._tensor(i, k) for k in (1, 2, 3))
        of_bias = of_beta = None
        if need_bias and bias is not None:
            # Batch statistics absorb a bias before the batch norm: its gradient is zero.
            of_bias = of_g if coefficients is None else of_g * coefficients[0]
            of_bias = torch.zeros_like(bias) if batch else of_bias.to(bias.dtype)
        if need_gamma and gamma is not None:
            self._gammas.append((i, of_gy, self.inv_std[i]))
        if need_beta and beta is not None:
            of_beta = of_g.to(beta.dtype)
        return of_bias, None, of_beta

    def rest(self) -> Iterable[tuple[int, Tensor]]:
        """Gradients of gamma that :meth:`of_layer` left, by layer; after the last layer."""
        if not self._gammas:
            return
        layers, sums, inv_std = zip(*self._gammas, strict=True)
        for i, product in zip(layers, torch._foreach_mul(sums, inv_std), strict=True):
            gamma = self._tensor(i, 2)
            assert gamma is not None
            yield i, product.to(gamma.dtype)

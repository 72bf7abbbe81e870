"""Eval mode with gradients, without kernels for the backward: a fused forward, and PyTorch's own backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops.differentiation import gradients_again, wanted
from ...ops.spec import ConvSpec
from ...ops.unfused import unfused_conv

__all__ = ["UnfusedBackward"]


class UnfusedBackward(torch.autograd.Function):
    """``forward(chain, x, autocast, *sources) -> out``: fused; the backward runs the chain again, unfused.

    Saved are the input and the tensors that the chain was packed from, not the module, which may have changed by then.
    Eval mode updates no statistics, so the second run gives the same values. Where the backward is differentiated in
    turn, that run is connected with the saved tensors.
    """

    @staticmethod
    def forward(ctx: Any, chain: Any, x: Tensor, autocast: torch.dtype | None, *sources: Tensor | None) -> Tensor:
        ctx.specs, ctx.eps, ctx.autocast = chain.specs, chain.eps, (x.device.type, autocast)
        ctx.tensors = [False, True, False, *(t is not None for t in sources)]
        ctx.save_for_backward(x, *sources)
        return chain.run(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, need_x, _, *need_sources = wanted(ctx)
        device, dtype = ctx.autocast

        def again(*tensors: Any) -> Tensor:
            with torch.autocast(device, dtype, enabled=dtype is not None):
                return _unfused(ctx.specs, ctx.eps, *tensors)

        grad_x, *grad_sources = gradients_again(again, ctx.saved_tensors, [need_x, *need_sources], grad)
        return None, grad_x, None, *grad_sources


def _unfused(specs: Sequence[ConvSpec], eps: list[float], x: Tensor, *sources: Any) -> Tensor:
    """The chain on PyTorch's own operators; ``sources``: six tensors a layer, in a row."""
    values = [x]
    for i, (spec, epsilon) in enumerate(zip(specs, eps, strict=True)):
        weight, bias, gamma, beta, mean, var = sources[i * 6 : (i + 1) * 6]
        inputs = [values[at] for at in (spec.source, spec.residual) if at >= 0]
        name = "conv_bn_relu" if spec.relu else "conv_bn"
        values.append(
            unfused_conv(
                *(name, inputs, weight, bias, (gamma, beta, mean, var, epsilon)),
                *(list(spec.stride), list(spec.padding), [1, 1], 1),
            )
        )
    return values[-1]

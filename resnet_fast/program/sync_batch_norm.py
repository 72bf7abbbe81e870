"""Synchronised batch norm on any device that can all-reduce; :class:`.loop.Trainer` converts networks to it.

``torch.nn.SyncBatchNorm`` refuses CPU tensors; this one computes the same from the same ``state_dict``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["SyncBatchNorm2d", "convert"]


def _per_channel(t: Tensor) -> Tensor:
    return t[None, :, None, None]


class _Normalize(torch.autograd.Function):
    """y = (x - mean) * invstd * weight + bias, with mean and variance over the batches of all processes.

    Forward: each process gathers count, mean and M2 = sum((x - mean)^2) of all batches and combines them in the order
    of ranks (Chan, Golub, LeVeque 1979): without cancellation, and bitwise equal everywhere. Backward, with
    xhat = (x - mean) * invstd and sums over all processes:

        dx = weight * invstd * (dy - sum(dy) / n - xhat * sum(dy * xhat) / n)

    The gradients of weight and bias are those of the process's own batch: data parallelism averages them like others.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.to(weight.dtype)
        count = x.numel() // x.shape[1]
        own = wide.new_zeros(3, x.shape[1])
        if count > 0:  # an empty batch has weight zero
            variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
            own.copy_(torch.stack([torch.full_like(mean, count), mean, variance * count]))
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, own)
        counts, means, m2s = torch.stack(gathered).double().unbind(1)
        n = counts.sum(0)
        mean64 = (counts * means).sum(0) / n
        var64 = (m2s.sum(0) + (counts * (means - mean64) ** 2).sum(0)) / n
        mean, variance = mean64.to(weight.dtype), var64.to(weight.dtype)
        invstd = (var64 + eps).rsqrt().to(weight.dtype)
        xhat = (wide - _per_channel(mean)) * _per_channel(invstd)
        ctx.save_for_backward(x, weight, mean, invstd, n)
        ctx.mark_non_differentiable(mean, variance, n)
        return (xhat * _per_channel(weight) + _per_channel(bias)).to(x.dtype), mean, variance, n

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable raises only if the incoming gradient requires one
            raise RuntimeError("create_graph=True: SyncBatchNorm2d has no second derivatives, want create_graph=False")
        x, weight, mean, invstd, n = ctx.saved_tensors
        wide = grad.to(weight.dtype)
        xhat = (x.to(weight.dtype) - _per_channel(mean)) * _per_channel(invstd)
        grad_bias, grad_weight = wide.sum((0, 2, 3)), (wide * xhat).sum((0, 2, 3))
        sums = torch.stack([grad_bias, grad_weight]).double()
        dist.all_reduce(sums)
        mean_grad, mean_grad_xhat = (sums / n).to(weight.dtype)
        dx = wide - _per_channel(mean_grad) - xhat * _per_channel(mean_grad_xhat)
        return (dx * _per_channel(weight * invstd)).to(x.dtype), grad_weight, grad_bias, None


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` over the joined batches of all processes of the default group, in training mode.

    Equivalent to ``nn.SyncBatchNorm``, and to ``nn.BatchNorm2d`` in one process with all the images. In eval mode, and
    with one process, it runs ``nn.BatchNorm2d``. Collective: all processes must call it.

    Shape: ``[N, C, H, W] -> [N, C, H, W]``; float16 and bfloat16 images are computed in the weights' dtype.

    Raises:
        ValueError: as in ``nn.BatchNorm2d``, if all processes together have one value per channel.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, variance, n = _Normalize.apply(x, self.weight, self.bias, self.eps)
        if self.running_mean is not None:
            if int(n[0]) < 2:
                raise ValueError(f"SyncBatchNorm2d got {int(n[0])} value per channel, want at least 2 to train")
            self._track(mean, variance, n)
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, n: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((variance * (n / (n - 1))).to(self.running_var.dtype), share)


def convert(network: nn.Module) -> None:
    """Makes every ``nn.BatchNorm2d`` in ``network`` a :class:`SyncBatchNorm2d`, in place; parameters are unchanged."""
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            if not module.affine:
                raise ValueError("convert: a BatchNorm2d without weight and bias, want affine=True")
            module.__class__ = SyncBatchNorm2d

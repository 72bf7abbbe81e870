"""Synchronised batch norm: the statistics over all processes, and the module that computes it in plain PyTorch.

Chains compute the same in :mod:`.training.synchronized`. ``torch.nn.SyncBatchNorm`` refuses CPU tensors where it runs
unfused; :class:`SyncBatchNorm2d` runs on any device that can all-reduce, with the same ``state_dict``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["SyncBatchNorm2d", "all_gather", "check_count", "combine", "convert", "group_of", "is_synchronized"]


def group_of(process_group: Any) -> Any:
    """The process group that statistics are taken over; None where this process is alone, or not in the group.

    process_group: None for all processes, as in ``torch.nn.SyncBatchNorm``.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = dist.group.WORLD if process_group is None else process_group
    return group if dist.get_world_size(group) > 1 else None


def is_synchronized(module: Any) -> bool:
    """Whether ``module`` takes its statistics over processes, if there are several."""
    return type(module) in (SyncBatchNorm2d, nn.SyncBatchNorm)


def all_gather(own: Tensor, group: Any, *, async_op: bool = False) -> tuple[Tensor, Any]:
    """``own`` of each process in the order of ranks, as [processes, ...]; with ``async_op`` what to wait for, too."""
    gathered = own.new_empty(dist.get_world_size(group), *own.shape)
    return gathered, dist.all_gather(list(gathered.unbind(0)), own, group=group, async_op=async_op)


def combine(gathered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance per channel over all processes.

    gathered: float64 [processes, 3, C], of each process the count, the mean and M2 = sum((x - mean)^2). Combined in the
    order of ranks without cancellation (Chan, Golub, LeVeque 1979), so bitwise equal on all processes. A count of 0
    has no weight.
    """
    counts, means, m2s = gathered.unbind(1)
    n = counts.sum(0)
    mean = (counts * means).sum(0) / n
    return n, mean, (m2s + counts * (means - mean) ** 2).sum(0) / n


def check_count(own: int, n: Tensor) -> None:
    """Raises ValueError if all processes together have less than two values per channel.

    So does ``nn.BatchNorm2d``; ``nn.SyncBatchNorm`` of several processes goes on. A process with two ``own`` values
    knows it without reading ``n``, for which the host would wait.
    """
    if own < 2 and int(n.min()) < 2:
        raise ValueError(f"Expected more than 1 value per channel when training, got {int(n.min())} in all processes")


def _per_channel(t: Tensor) -> Tensor:
    return t[None, :, None, None]


def _wide(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` in the dtype of the arithmetic: float32, or float64 where the weights are."""
    return x.to(torch.promote_types(weight.dtype, torch.float32))


class _Normalize(torch.autograd.Function):
    """y = (x - mean) * invstd * weight + bias, with mean and variance over the batches of all processes.

    Backward, with xhat = (x - mean) * invstd and sums over all processes:

        dx = weight * invstd * (dy - sum(dy) / n - xhat * sum(dy * xhat) / n)

    The gradients of weight and bias are those of the process's own batch: data parallelism averages them like others.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = _wide(x, weight)
        count = x.numel() // x.shape[1]
        own = wide.new_zeros(3, x.shape[1], dtype=torch.float64)
        if count > 0:
            variance, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
            own[0], own[1], own[2] = count, mean, variance.double() * count
        gathered, _ = all_gather(own, group)
        n, mean64, var64 = combine(gathered)
        check_count(count, n)
        mean, variance = mean64.to(wide.dtype), var64.to(wide.dtype)
        invstd = (var64 + eps).rsqrt().to(wide.dtype)
        xhat = (wide - _per_channel(mean)) * _per_channel(invstd)
        ctx.save_for_backward(x, weight, mean, invstd, n)
        ctx.mark_non_differentiable(mean, variance, n)
        ctx.group = group
        return (xhat * _per_channel(weight) + _per_channel(bias)).to(x.dtype), mean, variance, n

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable raises only if the incoming gradient requires one
            raise RuntimeError("create_graph=True: SyncBatchNorm2d has no second derivatives, want create_graph=False")
        x, weight, mean, invstd, n = ctx.saved_tensors
        wide = _wide(grad, weight)
        xhat = (_wide(x, weight) - _per_channel(mean)) * _per_channel(invstd)
        grad_bias, grad_weight = wide.sum((0, 2, 3)), (wide * xhat).sum((0, 2, 3))
        sums = torch.stack([grad_bias, grad_weight]).double()
        dist.all_reduce(sums, group=ctx.group)
        mean_grad, mean_grad_xhat = (sums / n).to(wide.dtype)
        dx = wide - _per_channel(mean_grad) - xhat * _per_channel(mean_grad_xhat)
        dx = (dx * _per_channel(weight * invstd)).to(x.dtype)
        return dx, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` over the joined batches of all processes of a group, in training mode.

    Equivalent to ``nn.SyncBatchNorm``, and to ``nn.BatchNorm2d`` in one process with all the images. In eval mode, and
    with one process, it runs ``nn.BatchNorm2d``. Collective: all processes must call it.

    Args:
        process_group: the processes, all by default; the others as in ``nn.BatchNorm2d``.

    Shape: ``[N, C, H, W] -> [N, C, H, W]``; computed in float32, or in float64 where the weights are.

    Raises:
        ValueError: as in ``nn.BatchNorm2d``, if all processes together have one value per channel.
    """

    def __init__(self, *args: Any, process_group: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.process_group = process_group

    def forward(self, x: Tensor) -> Tensor:
        group = group_of(self.process_group) if self.training else None
        if group is None:
            return super().forward(x)
        self._check_input_dim(x)
        plain = torch.ones(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        weight = plain if self.weight is None else self.weight
        bias = torch.zeros_like(weight) if self.bias is None else self.bias
        y, mean, variance, n = _Normalize.apply(x, weight, bias, self.eps, group)
        if self.track_running_stats and self.running_mean is not None:
            self._track(mean, variance, n)
        return y

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, n: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        share = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                share = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_((variance * (n / (n - 1))).to(self.running_var.dtype), share)


def convert(network: nn.Module, process_group: Any = None) -> None:
    """Makes every ``nn.BatchNorm2d`` in ``network`` a :class:`SyncBatchNorm2d`, in place; parameters are unchanged."""
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
            module.process_group = process_group

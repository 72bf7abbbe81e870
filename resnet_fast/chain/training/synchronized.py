"""Chain training with synchronised batch norm: what the processes tell one another between the kernels.

    forward    each process gathers [count, mean, M2] of all, and combines them in the order of ranks
    backward   dy = a * g + b * (y - mean) + c, with sum(g) and sum(g * (y - mean)) all-reduced, and the count of all;
               gradients of gamma and beta are those of the process's own batch: data parallelism averages them

One collective carries the statistics of all layers that :func:`batches` puts together. It runs beside what need not
wait for it: a projection's convolution in the forward and its gradients in the backward, and on GPUs the gradient of
the weight. On CPUs both gradients of a convolution come out of one call: apart they cost more than the wait, because
the collective takes its time from the same cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ... import backends
from ..sync_batch_norm import all_gather, check_count, combine
from .kernels import Gradients, Kernels
from .layers import Layer, Value

__all__ = ["SyncedKernels", "batches"]


def batches(layers: Sequence[Layer]) -> dict[int, list[int]]:
    """The synchronised layers whose statistics one collective carries, by the layer behind which it starts.

    There are as few collectives as the dependencies allow. Step ``2 * i`` is before the convolution of layer i, ``2 * i
    + 1`` behind it. Statistics exist from the latter on, and are due where the layer's value is first read; the steps
    to wait at cover all these intervals. Where several would do a layer takes the last, so that earlier collectives
    start early: the statistics of a projection go with those of the layer that adds it.
    """
    due = {}
    for i, layer in enumerate(layers):
        if layer.synced:
            reads = [2 * k for k, other in enumerate(layers) if other.source == i + 1]
            reads += [2 * k + 1 for k, other in enumerate(layers) if other.residual == i + 1]
            due[i] = 2 * i + 1 if layer.residual >= 0 else min(reads, default=2 * len(layers))
    steps: list[int] = []
    for i in sorted(due, key=due.__getitem__):
        if not steps or steps[-1] < 2 * i + 1:
            steps.append(due[i])
    together: dict[int, list[int]] = {}
    for i, last in due.items():
        together.setdefault(max(step for step in steps if step <= last), []).append(i)
    return {members[-1]: members for members in together.values()}


def _row(stats: Tensor, count: int) -> Tensor:
    """[count; mean; M2] of [mean; variance]."""
    row = stats.new_empty((3, stats.shape[1]), dtype=torch.float64)
    row[0] = count
    row[1:] = stats
    row[2].mul_(count)
    return row


class Statistics:
    """The statistics of one forward; layers: as :func:`batches` returns them."""

    def __init__(self, layers: dict[int, list[int]], group: Any) -> None:
        self._batches, self._group = layers, group
        self._own: dict[int, tuple[Tensor, int]] = {}
        self._started: dict[int, tuple[list[int], Tensor, Any]] = {}  # by layer
        self._found: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, i: int, stats: Tensor, count: int) -> None:
        """stats: [mean; variance] of layer i, over ``count`` values a channel of this process."""
        self._own[i] = stats, count
        members = self._batches.get(i)
        if members is None:
            return
        rows = torch.cat([_row(*self._own[j]) for j in members], 1)
        self._started.update(dict.fromkeys(members, (members, *all_gather(rows, self._group, async_op=True))))

    def wait(self, i: int) -> tuple[Tensor, Tensor]:
        """The count and [mean; variance] of layer i, over all processes."""
        if i not in self._found:
            members, gathered, work = self._started[i]
            work.wait()
            self._finish(members, *combine(gathered))
        return self._found[i]

    def _finish(self, members: list[int], n: Tensor, mean: Tensor, var: Tensor) -> None:
        first = 0
        for j in members:
            stats, count = self._own[j]
            end = first + stats.shape[1]
            check_count(count, n[first:end])
            self._found[j] = n[first], torch.stack((mean[first:end], var[first:end])).to(stats.dtype)
            first = end


class _Sums:
    """Reductions of a gradient: of this process, and the same of all, for which :meth:`wait` waits."""

    def __init__(self, own: Tensor, total: Tensor, work: Any) -> None:
        self.own, self._total, self._work = own, total, work

    def wait(self) -> Tensor:
        self._work.wait()
        return self._total

    def second(self) -> _Sums:
        return _Sums(self.own[::2].clone(), self._total[::2], self._work)


class SyncedKernels(Kernels):
    """The operators that every device has, for a chain of ``layers`` with the batches of all processes of ``group``."""

    def __init__(self, layers: list[Layer], group: Any) -> None:
        self._batches, self._group = batches(layers), group

    def statistics(self) -> Statistics:
        return Statistics(self._batches, self._group)

    def convolve(
        self, layer: Layer, source: Value, tensors: Sequence[Tensor | None], running: Any = None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        if not layer.synced:
            return super().convolve(layer, source, tensors, running)
        weight, bias, *_ = tensors
        assert weight is not None
        empty = source.tensor.shape[0] == 0
        y, stats = self._convolve(layer, source, weight, bias, not empty)
        return y, stats.new_zeros(2, weight.shape[0]) if empty else stats, None, None

    def _reduce(self, sums: Tensor) -> _Sums:
        total = sums.clone()
        return _Sums(sums, total, dist.all_reduce(total, group=self._group, async_op=True))

    def bn_backward_reduce(
        self, grad: Tensor, relu_source: Tensor | None, affine: Tensor | None, ys: list[Tensor], stats: list[Tensor]
    ) -> tuple[Tensor, Any]:
        out, sums = super().bn_backward_reduce(grad, relu_source, affine, ys, stats)
        return out, self._reduce(sums)

    def second_reduction(self, sums: Any) -> Any:
        return sums.second()

    def gradients(
        self, layers: list[Layer], pixels: list[Any], stats: list[Tensor], tensors: list[Tensor | None], needed: Any
    ) -> Gradients:
        return _SyncedGradients(layers, pixels, stats, tensors, needed)

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
        given = (layer, grad, y, coefficients, source, weight, filters)
        apart = reduce and needs[1] and self._apart(grad)
        dx, dw, sums = super().backward(*given, (True, False) if apart else needs, residual, reduce, ys, stats)
        if reduce:
            sums = self._reduce(sums)
        if apart:
            _, dw, _ = super().backward(*given, (False, True), None, False, [], [])
        return dx, dw, sums

    def _apart(self, grad: Tensor) -> bool:
        """Whether the gradient of a weight is computed beside the collective, in a call of its own."""
        return backends.kind(grad) == "cuda"


class _SyncedGradients(Gradients):
    """pixels: the count of all processes, a tensor, where batch norm is synchronised."""

    def __init__(
        self, layers: list[Layer], pixels: list[Any], stats: list[Tensor], tensors: list[Tensor | None], needed: Any
    ) -> None:
        own = [1 if layer.synced else n for layer, n in zip(layers, pixels, strict=True)]
        super().__init__(layers, own, stats, tensors, needed)
        for i, rows in self.coefficients.items():
            if layers[i].synced:
                rows[1:3].div_(pixels[i])

    def of_layer(
        self, i: int, sums: Any, needs: Sequence[bool]
    ) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None, Tensor | None]]:
        own = sums.own if isinstance(sums, _Sums) else sums
        total = sums.wait() if isinstance(sums, _Sums) and self.layers[i].synced else own
        return self._complete(i, total), self._vectors(i, own, needs)

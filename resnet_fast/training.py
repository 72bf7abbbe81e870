"""Training: a chain of convolutions and batch norms as one autograd function, and the running statistics beside it.

What the function computes is in :mod:`resnet_fast.fission`. In eager mode it is a ``torch.autograd.Function``; under
``torch.compile`` it is an operator, :mod:`resnet_fast.train_stage`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends, train_stage  # noqa: F401  (registers the operator)
from .differentiation import first_order, gradients_again, wanted
from .fission import TENSORS, Backward, Kept, Layer, counts, dense, forward, layers_of, unpacked
from .watch import Watch

__all__ = ["Program"]


class Program:
    """The chain that a recorder wrote down, to be run in training mode.

    Raises:
        ValueError: a batch norm would have a single value per channel, as PyTorch raises it.
    """

    owner: Any = None  # who keeps it: attributes may be copied to another module

    def __init__(self, pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d | None]], fields: list[int]) -> None:
        self.pairs, self.fields = pairs, fields
        self.watch: Watch | None = None
        norms = [bn for _, bn in pairs]
        self.eps = [0.0 if bn is None else bn.eps for bn in norms]
        self.normalized = [bn is not None for bn in norms]
        self.batch = [bn is not None and (bn.training or bn.running_mean is None) for bn in norms]
        self.layers = layers_of(fields, self.eps, self.normalized, self.batch)
        self.rounds = _rounds(norms)

    def fresh(self) -> bool:
        """Whether the modules are as they were when ``watch`` was set."""
        return self.watch is not None and self.watch.unchanged()

    def keeps_statistics(self) -> bool:
        """Whether running statistics may be written: of those made in inference mode, not outside of it."""
        if torch.is_inference_mode_enabled():
            return True
        norms = (bn for (_, bn), batch in zip(self.pairs, self.batch, strict=True) if bn is not None and batch)
        kept = (t for bn in norms for t in (bn.running_mean, bn.num_batches_tracked))
        return not any(t is not None and t.is_inference() for t in kept)

    def reason(self) -> str | None:
        """Why the chain cannot be run, or None."""
        for layer in self.layers:
            if layer.relu and not layer.normalized:
                return "a ReLU without batch norm"
            if layer.residual >= 0 and not (layer.relu and layer.normalized):
                return "a sum without batch norm and ReLU"
        norms = [bn for _, bn in self.pairs if bn is not None]
        kept = {memory for bn in norms if bn.training for memory in _statistics(bn)}
        if any(memory in kept for bn in norms if not bn.training for memory in _statistics(bn)):
            return "statistics that one batch norm keeps and another one takes"
        return None

    def run(self, x: Tensor) -> Tensor:
        pixels = counts(self.layers, x.shape)
        for (conv, _), n, batch in zip(self.pairs, pixels, self.batch, strict=True):
            if batch and n == 1:
                size = torch.Size((1, conv.weight.shape[0], 1, 1))
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
        tensors: list[Tensor | None] = []
        for (conv, bn), batch in zip(self.pairs, self.batch, strict=True):
            given = bn is not None and not batch
            tensors += [conv.weight, conv.bias]
            tensors += [None, None] if bn is None else [bn.weight, bn.bias]
            tensors += [bn.running_mean, bn.running_var] if given and bn is not None else [None, None]

        def track(moments: list[Tensor]) -> None:
            with torch.no_grad():
                norms = [bn for _, bn in self.pairs]
                for places in self.rounds:
                    _track([(norms[i], moments[i], pixels[i]) for i in places])

        if torch.compiler.is_compiling():
            out, moments = self._traced(x, tensors)
            track(moments)
            return out
        # Outside of the function: what it saves is then its input, with which a second derivative is connected.
        recompute, copied = backends.training.recompute_outputs, dense(x)
        original = None if copied is x else x.detach()
        out, *_ = _Train.apply(self.layers, recompute, track, original, copied, *tensors)
        return out

    def _traced(self, x: Tensor, tensors: list[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
        present = [t is not None for t in tensors]
        given = [t for t in tensors if t is not None]
        kept = torch.ops.resnet_fast.train_stage(
            x, given, present, self.fields, self.eps, self.batch, backends.training.recompute_outputs
        )
        return kept[0], kept[1 : 1 + len(self.layers)]


def _memory(t: Tensor) -> Any:
    """The same for tensors that share their memory, as far as the compiler lets one ask."""
    return id(t) if torch.compiler.is_compiling() else t.data_ptr() or id(t)


def _statistics(bn: nn.BatchNorm2d) -> list[Any]:
    tensors = (bn.running_mean, bn.running_var, bn.num_batches_tracked)
    return [_memory(t) for t in tensors if t is not None]


def _rounds(norms: list[nn.BatchNorm2d | None]) -> list[list[int]]:
    """Places of those that may keep statistics; in each round of updates none that shares them with another in it.

    A batch norm may be called twice, or hold buffers of another one: the later call starts from what the earlier left.
    """
    rounds: list[list[int]] = []
    last: dict[Any, int] = {}
    for i, bn in enumerate(norms):
        memory = [] if bn is None or not bn.training else _statistics(bn)
        if memory:
            turn = 1 + max(last.get(m, -1) for m in memory)
            last.update((m, turn) for m in memory)
            if turn == len(rounds):
                rounds.append([])
            rounds[turn].append(i)
    return rounds


def _track(calls: list[tuple[Any, Tensor, int]]) -> None:
    """Running statistics, as ``nn.BatchNorm2d`` keeps them: the variance unbiased.

    calls: batch norms that share nothing, [mean; variance] of what each was given, and its pixels.
    """
    calls = [call for call in calls if call[0].track_running_stats]
    counters = [bn.num_batches_tracked for bn, _, _ in calls if bn.num_batches_tracked is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    groups: dict[tuple[float, torch.dtype], list[tuple[nn.BatchNorm2d, Tensor, int]]] = {}
    for bn, now, n in calls:
        if bn.running_mean is None:
            continue
        if bn.momentum is not None:
            groups.setdefault((bn.momentum, bn.running_mean.dtype), []).append((bn, now, n))
        elif bn.num_batches_tracked is not None:
            _average(bn, now, n)
    for (momentum, dtype), members in groups.items():
        rows = [now.to(dtype).unbind(0) for _, now, _ in members]
        running: Any = [bn.running_mean for bn, _, _ in members]
        torch._foreach_mul_(running, 1 - momentum)
        torch._foreach_add_(running, [mean for mean, _ in rows], alpha=momentum)
        running = [bn.running_var for bn, _, _ in members]
        shares = [momentum * n / (n - 1) for _, _, n in members]
        torch._foreach_mul_(running, 1 - momentum)
        torch._foreach_add_(running, torch._foreach_mul([variance for _, variance in rows], shares))


def _average(bn: nn.BatchNorm2d, now: Tensor, n: int) -> None:
    """``momentum=None``: the plain mean of all batches, of which there must be a count. It stays a tensor, which graphs
    can hold."""
    assert bn.num_batches_tracked is not None
    assert bn.running_mean is not None
    assert bn.running_var is not None
    weight = 1.0 / bn.num_batches_tracked.to(torch.float64)
    mean, variance = now.unbind(0)
    bn.running_mean.copy_(bn.running_mean * (1 - weight) + mean * weight)
    bn.running_var.copy_(bn.running_var * (1 - weight) + variance * (weight * (n / (n - 1))))


class _Train(torch.autograd.Function):
    """``forward(layers, recompute, track, original, x, *TENSORS tensors a layer) -> (out, [mean; variance] of each
    layer)``

    ``x``: channels_last. ``original``: what it is a copy of, if it is one: changes of that raise, as in PyTorch.
    ``track``: is given the means and variances before anything is saved, because a checkpoint ends its second run when
    the last tensor is. More than first derivatives come of PyTorch's own operators, by running these again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layers: list[Layer],
        recompute: bool,
        track: Callable[[list[Tensor]], None],
        original: Tensor | None,
        x: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        # Their autograd keys only say that the operators have no gradient of their own.
        with torch._C._AutoDispatchBelowAutograd():
            out, kept = forward(layers, x, list(tensors), recompute)
        track(kept.moments)
        ctx.layers = layers
        ctx.tensors = [False] * 3 + [t is not None for t in (original, x, *tensors)]
        ctx.save_for_backward(original, x, *kept.ys, *kept.sums, *kept.scales, *kept.moments, *tensors)
        ctx.mark_non_differentiable(*kept.moments)
        return out, *kept.moments

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        count = len(ctx.layers)
        if not first_order(grad):
            _, x, *saved = ctx.saved_tensors
            tensors = [x, *saved[4 * count :]]
            return None, None, None, None, *gradients_again(_Again(ctx.layers), tensors, wanted(ctx)[4:], grad)
        _, x, *saved = ctx.saved_tensors
        # Unless the graph is kept, each map goes as soon as the backward pass has gone by, not at its end.
        ctx.maybe_clear_saved_tensors()
        kept = Kept(*([unpacked(t) for t in saved[i * count : (i + 1) * count]] for i in range(4)))
        x, tensors = dense(x), saved[4 * count :]
        del saved
        with torch._C._AutoDispatchBelowAutograd():
            run = Backward(ctx.layers, x, kept, tensors, wanted(ctx)[4:])
            return None, None, None, None, *run.gradients(grad)


class _Again:
    """The chain on PyTorch's own operators; running statistics stay as they are."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers

    def __call__(self, x: Tensor, *tensors: Any) -> Tensor:
        values = [x]
        with torch.autocast(x.device.type, enabled=False):  # the chain was given x in autocast's dtype
            for i, layer in enumerate(self.layers):
                residual = None if layer.residual < 0 else values[layer.residual]
                own = tensors[TENSORS * i : TENSORS * (i + 1)]
                values.append(self._layer(layer, values[layer.source], residual, *own))
        return values[-1]

    @staticmethod
    def _layer(
        layer: Layer, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, *norm: Tensor | None
    ) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        y = F.conv2d(x, weight.to(x.dtype), bias, layer.stride, layer.padding)
        if layer.normalized:
            gamma, beta, mean, var = norm
            y = F.batch_norm(y, mean, var, gamma, beta, training=layer.batch_statistics, eps=layer.eps)
        if residual is not None:
            y = y + residual
        return F.relu(y) if layer.relu else y

"""Chain training as one autograd function: :class:`Program`, which the executor records and calls.

:mod:`.driver` computes forward and backward. In eager mode they are a ``torch.autograd.Function``; under
``torch.compile``, the operators of :mod:`.operator`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import backends
from ...ops.differentiation import first_order, gradients_again, wanted
from ...ops.spec import ConvSpec, encode
from ..guard import StalenessGuard
from ..sync_batch_norm import group_of, is_synchronized
from . import operator as train_chain  # noqa: F401  (registers the operator)
from .cuts import is_cut, stages
from .layers import SAVED, TENSORS, Layer, SavedTensors, counts, dense, layers_of, unpacked
from .passes import Passes
from .running_statistics import Running, RunningStatistics, buffer_memory, held

__all__ = ["Program"]


class Program:
    """A recorded chain, to be run in training mode.

    Raises:
        ValueError: in :meth:`run`, as in PyTorch, if a batch norm has a single value per channel.
    """

    owner: Any = None  # the module that caches it: a copied attribute must not serve another module
    _stages: list[Program] | None = None  # made when they first run; empty where there is one alone

    def __init__(self, pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d | None]], specs: list[ConvSpec]) -> None:
        self.pairs, self.specs, self.fields = pairs, specs, encode(specs)
        self.guard: StalenessGuard | None = None
        norms = [bn for _, bn in pairs]
        self.eps = [0.0 if bn is None else bn.eps for bn in norms]
        self.normalized = [bn is not None for bn in norms]
        self.batch = [bn is not None and (bn.training or bn.running_mean is None) for bn in norms]
        self.synced = [bn is not None and bn.training and is_synchronized(bn) for bn in norms]
        self.layers = layers_of(specs, self.eps, self.normalized, self.batch)
        self.statistics = RunningStatistics(norms, self.batch)
        self.passes = Passes(self.layers)

    def _connect(self) -> Passes:
        """The passes, among the processes that there are now: they may have met after the recording."""
        at = self.synced.index(True) if True in self.synced else None
        group = None if at is None else group_of(cast(Any, self.pairs[at][1]).process_group)
        if group is not self.passes.group:
            synced = [own and group is not None for own in self.synced]
            self.layers = [layer._replace(synced=own) for layer, own in zip(self.layers, synced, strict=True)]
            self.passes = Passes(self.layers, group)
        return self.passes

    def reason_for(self, x: Tensor) -> str | None:
        """Why ``x`` cannot be run, which all processes must answer alike, or None."""
        together = True in self.synced and self._connect().group is not None
        if together and self.synced != self.batch:
            return "batch norms with and without the statistics of all processes"
        # The other processes may have images.
        return "an empty input" if x.numel() == 0 and not (together and x.shape[0] == 0) else None

    def is_valid(self) -> bool:
        """Whether the modules are unchanged since ``guard`` was set."""
        return self.guard is not None and self.guard.is_valid()

    def reason(self) -> str | None:
        """Why the chain cannot be run, or None."""
        for layer in self.layers:
            if layer.relu and not layer.normalized:
                return "a ReLU without batch norm"
            if layer.residual >= 0 and not (layer.relu and layer.normalized):
                return "a sum without batch norm and ReLU"
        norms = [bn for _, bn in self.pairs if bn is not None]
        tracked = {memory for bn in norms if bn.training for memory in buffer_memory(bn)}
        if any(memory in tracked for bn in norms if not bn.training for memory in buffer_memory(bn)):
            return "statistics that one batch norm keeps and another one takes"
        synced = [cast(Any, bn) for (_, bn), own in zip(self.pairs, self.synced, strict=True) if own]
        if synced and torch.compiler.is_compiling():
            return f"{type(synced[0]).__name__} under torch.compile"
        if any(bn.process_group is not synced[0].process_group for bn in synced):
            return "batch norms of several process groups"
        return None

    def run(self, x: Tensor) -> Tensor:
        for part in self._parts():
            x = part._run(x)
        return x

    def _parts(self) -> Sequence[Program]:
        """The program, or under DistributedDataParallel those of its stages."""
        if torch.compiler.is_compiling() or not is_cut(self.pairs[0][0]):
            return (self,)
        if self._stages is None:
            cut, pairs = stages(self.specs, [conv.weight.nbytes for conv, _ in self.pairs]), iter(self.pairs)
            self._stages = [type(self)(list(islice(pairs, len(own))), own) for own in cut] if len(cut) > 1 else []
        return self._stages or (self,)

    def _run(self, x: Tensor) -> Tensor:
        passes, pixels = self._connect(), counts(self.layers, x.shape)
        for (conv, _), n, layer in zip(self.pairs, pixels, self.layers, strict=True):
            if layer.batch_statistics and not layer.synced and n == 1:
                size = torch.Size((1, conv.weight.shape[0], 1, 1))
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
        tensors = self._tensors()
        if torch.compiler.is_compiling():
            out, stats = self._traced(x, tensors)
            self.statistics.track(stats, pixels, ())
            return out
        running = self.statistics.for_kernels(x.device) if passes.updates_statistics(x) else ()
        # Copy to channels_last outside of the function: it then saves its input, which second derivatives connect to.
        track = partial(self._track, pixels, running)
        recompute, copied = backends.training.recompute_outputs, dense(x)
        original = None if copied is x else x.detach()
        out, *_ = _Train.apply(passes, recompute, running, track, original, copied, *tensors)
        return out

    def _track(self, pixels: list[int], done: Sequence[Running | None], saved: SavedTensors) -> None:
        everywhere = [own if n is None else n for own, n in zip(pixels, saved.counts, strict=True)]
        self.statistics.track(saved.stats, everywhere, done)

    def _tensors(self) -> list[Tensor | None]:
        """``TENSORS`` of each layer."""
        tensors: list[Tensor | None] = []
        for (conv, bn), batch in zip(self.pairs, self.batch, strict=True):
            tensors += [held(conv, "weight"), held(conv, "bias")]
            tensors += [None, None] if bn is None else [held(bn, "weight"), held(bn, "bias")]
            given = bn is not None and not batch
            statistics = ("running_mean", "running_var")
            tensors += [held(bn, name) for name in statistics] if given and bn is not None else [None, None]
        return tensors

    def _traced(self, x: Tensor, tensors: list[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
        present = [t is not None for t in tensors]
        given = [t for t in tensors if t is not None]
        results = torch.ops.resnet_fast.train_chain(
            x, given, present, self.fields, self.eps, self.batch, backends.training.recompute_outputs
        )
        return results[0], results[1 : 1 + len(self.layers)]


class _Train(torch.autograd.Function):
    """``forward(passes, recompute, running, track, original, x, *TENSORS a layer) -> (out, *[mean; variance] a layer)``

    x: channels_last. original: the tensor that x is a copy of, or None; saved so that in-place changes to it raise, as
    in PyTorch. running: the statistics that kernels update. track: called with what will be saved before it is
    saved, because activation checkpointing stops its second run at the last saved tensor. Second derivatives run the
    chain again on PyTorch's own operators.
    """

    @staticmethod
    def forward(
        ctx: Any,
        passes: Passes,
        recompute: bool,
        running: Sequence[Running | None],
        track: Callable[[SavedTensors], None],
        original: Tensor | None,
        x: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        # Skip the operators' autograd keys, which only raise.
        with torch._C._AutoDispatchBelowAutograd():
            out, saved = passes.forward(x, list(tensors), recompute, running)
        track(saved)
        ctx.passes = passes
        ctx.tensors = [False] * 4 + [t is not None for t in (original, x, *tensors)]
        ctx.save_for_backward(original, x, *(t for each in saved for t in each), *tensors)
        ctx.mark_non_differentiable(*saved.stats)
        return out, *saved.stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
        layers = ctx.passes.layers
        count = len(layers)
        if not first_order(grad):
            if ctx.passes.group is not None:
                raise RuntimeError(
                    "synchronised batch norm has no second derivatives and no batches of gradients: want "
                    "create_graph=False and is_grads_batched=False"
                )
            _, x, *rest = ctx.saved_tensors
            tensors = [x, *rest[SAVED * count :]]
            return None, None, None, None, None, *gradients_again(_EagerChain(layers), tensors, wanted(ctx)[5:], grad)
        _, x, *rest = ctx.saved_tensors
        # Unless the graph is retained, free each activation after its last use, not at the end of the backward.
        ctx.maybe_clear_saved_tensors()
        saved = SavedTensors(*([unpacked(t) for t in rest[i * count : (i + 1) * count]] for i in range(SAVED)))
        x, tensors = dense(x), rest[SAVED * count :]
        del rest
        with torch._C._AutoDispatchBelowAutograd():
            found = ctx.passes.backward(x, saved, tensors, wanted(ctx)[5:], grad)
            return None, None, None, None, None, *found


class _EagerChain:
    """The chain on PyTorch's own operators, without updating running statistics."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers

    def __call__(self, x: Tensor, *tensors: Any) -> Tensor:
        values = [x]
        with torch.autocast(x.device.type, enabled=False):  # x has autocast's dtype already
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

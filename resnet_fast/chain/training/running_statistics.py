"""Running statistics of the batch norms of a chain in training, updated as ``nn.BatchNorm2d`` does.

    running = (1 - momentum) * running + momentum * batch,   with the unbiased variance of the batch

GPU kernels that finalize a layer's statistics also update its running ones (:class:`Running`); all others are updated
here. :class:`.function.Program` calls it once a forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Running", "RunningStatistics", "held"]


_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Running(NamedTuple):
    """The tensors of a batch norm that a kernel updates."""

    mean: Tensor  # float32 [C]
    var: Tensor  # float32 [C]
    momentum: Tensor  # float32 [1], a tensor because it may change
    batches: Tensor  # int64 [], num_batches_tracked


class RunningStatistics:
    """norms: the batch norm of each layer, or None. batch: whether a layer is normalised by batch statistics."""

    def __init__(self, norms: Sequence[nn.BatchNorm2d | None], batch: Sequence[bool]) -> None:
        self.norms, self.batch = norms, batch
        self.rounds = _rounds(norms)
        self._writable: list[Any] = []  # buffers known to be writable
        # Caches of for_kernels, each with the key that it is valid for.
        self._momenta: tuple[Any, Tensor] | None = None
        self._found: tuple[list[Any], list[Running | None]] | None = None

    def writable(self) -> bool:
        """Whether the buffers may be written: outside of inference mode, not those made in it."""
        if torch.is_inference_mode_enabled():
            return True
        own = (bn for bn, batch in zip(self.norms, self.batch, strict=True) if bn is not None and batch)
        saved = [held(bn, name) for bn in own for name in _BUFFERS]
        if len(saved) != len(self._writable) or not all(map(is_, saved, self._writable)):
            if any(t is not None and t.is_inference() for t in saved):
                return False
            self._writable = saved
        return True

    def for_kernels(self, device: torch.device) -> list[Running | None]:
        """By layer, the tensors that a kernel can update: float32 on ``device``, shared with no other batch norm."""
        if len(self.rounds) != 1:
            return [None] * len(self.norms)
        norms: list[Any] = [self.norms[i] for i in self.rounds[0]]
        momenta = [bn.momentum if bn.track_running_stats else None for bn in norms]
        if self._momenta is None or self._momenta[0] != (momenta, device):
            values = torch.tensor([0.0 if v is None else v for v in momenta], dtype=torch.float32)
            self._momenta, self._found = ((momenta, device), values.to(device)), None
        buffers = [held(bn, name) for bn in norms for name in _BUFFERS]
        if self._found is None or not all(map(is_, buffers, self._found[0])):
            found: list[Running | None] = [None] * len(self.norms)
            columns = (buffers[k :: len(_BUFFERS)] for k in range(len(_BUFFERS)))
            rows = zip(self.rounds[0], momenta, self._momenta[1].split(1), *columns, strict=True)
            for i, momentum, share, mean, var, batches in rows:
                plain = _plain(mean, torch.float32, device) and _plain(var, torch.float32, device)
                if momentum is not None and plain and _plain(batches, torch.int64, device):
                    found[i] = Running(mean, var, share, batches)
            self._found = buffers, found
        return self._found[1]

    def track(self, stats: list[Tensor], pixels: list[Any], done: Sequence[Running | None]) -> None:
        """Updates all but those that kernels have ``done``.

        stats: [mean; variance] of each layer's output. pixels: how many values per channel they are of, a number, or a
        tensor where all processes count.
        """
        with torch.no_grad():
            for layers in self.rounds:
                calls = [(self.norms[i], stats[i], pixels[i]) for i in layers if not done or done[i] is None]
                _track([call for call in calls if call[0] is not None and call[0].track_running_stats])
        written = [t for r in done if r is not None for t in (r.mean, r.var, r.batches)]
        if written:
            torch.autograd.graph.increment_version(written)


def _plain(t: Tensor | None, dtype: torch.dtype, device: torch.device) -> bool:
    return t is not None and t.dtype == dtype and t.device == device and t.is_contiguous()


def held(module: nn.Module, name: str) -> Any:
    """``module.name`` for a parameter or buffer, without the slow path through ``__getattr__``."""
    for store in (module._parameters, module._buffers):
        if name in store:
            return store[name]
    return getattr(module, name)


def _memory(t: Tensor) -> Any:
    """Equal for tensors that share memory; under the compiler, which cannot tell, for the same tensor."""
    return id(t) if torch.compiler.is_compiling() else t.data_ptr() or id(t)


def buffer_memory(bn: nn.BatchNorm2d) -> list[Any]:
    """Keys of the memory of its running statistics: equal keys mean shared buffers."""
    tensors = (bn.running_mean, bn.running_var, bn.num_batches_tracked)
    return [_memory(t) for t in tensors if t is not None]


def _rounds(norms: Sequence[nn.BatchNorm2d | None]) -> list[list[int]]:
    """Layers that track statistics, in rounds of updates; within a round no two share a buffer.

    A batch norm may be called twice, or share buffers with another: the later update starts from the earlier's result.
    """
    rounds: list[list[int]] = []
    last: dict[Any, int] = {}
    for i, bn in enumerate(norms):
        memory = [] if bn is None or not bn.training else buffer_memory(bn)
        if memory:
            turn = 1 + max(last.get(m, -1) for m in memory)
            last.update((m, turn) for m in memory)
            if turn == len(rounds):
                rounds.append([])
            rounds[turn].append(i)
    return rounds


def _track(calls: list[Any]) -> None:
    """Updates batch norms that share nothing; calls: (batch norm, [mean; variance] of its input, pixels)."""
    counters = [n for n in (held(bn, "num_batches_tracked") for bn, *_ in calls) if n is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    groups: dict[tuple[float, torch.dtype], list[tuple[nn.BatchNorm2d, Tensor, Any]]] = {}
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
        variances = [variance for _, variance in rows]
        if any(isinstance(share, Tensor) for share in shares):  # the host need not know them
            torch._foreach_add_(running, [v * share for v, share in zip(variances, shares, strict=True)])
        else:
            torch._foreach_add_(running, torch._foreach_mul(variances, shares))


def _average(bn: nn.BatchNorm2d, now: Tensor, n: Any) -> None:
    """``momentum=None``: the cumulative average over all batches. Their count stays a tensor, so that CUDA graphs and
    compiled graphs can capture it."""
    assert bn.num_batches_tracked is not None
    assert bn.running_mean is not None
    assert bn.running_var is not None
    weight = 1.0 / bn.num_batches_tracked.to(torch.float64)
    mean, variance = now.unbind(0)
    bn.running_mean.copy_(bn.running_mean * (1 - weight) + mean * weight)
    bn.running_var.copy_(bn.running_var * (1 - weight) + variance * (weight * (n / (n - 1))))

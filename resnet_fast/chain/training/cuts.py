"""Under DistributedDataParallel a chain is cut into stages, each an autograd function of its own.

An autograd function returns all its gradients at the end of its backward, and DistributedDataParallel sends a bucket of
gradients when it is complete. Cut into stages, a chain has its last stage's gradients sent while the first stages still
go backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...ops.spec import ConvSpec
from .layers import block_ends

__all__ = ["is_cut", "stages"]

# What DistributedDataParallel sends at once, by default.
BUCKET_BYTES = 25 * 2**20


def stages(specs: Sequence[ConvSpec], sizes: Sequence[int]) -> list[list[ConvSpec]]:
    """The chain as chains, one behind the other; sizes: bytes of each layer's weight.

    A stage begins with the block that has a stride, or where what follows fills a bucket. A cut behind a residual sum,
    which is written and saved anyway, costs no memory.
    """
    starts, behind, end = [], 0, len(specs)
    for last in [*block_ends(specs), -1]:
        begin = last + 1
        behind += sum(sizes[begin:end])
        strided = any(max(spec.stride) > 1 for spec in specs[begin:end])
        if begin == 0 or strided or behind >= BUCKET_BYTES:
            starts.append(begin)
            behind = 0
        end = begin
    starts.reverse()
    return [
        [spec._replace(source=spec.source - a, residual=max(spec.residual - a, -1)) for spec in specs[a:b]]
        for a, b in zip(starts, [*starts[1:], len(specs)], strict=True)
    ]


# The first layers of chains that are cut.
_cut: weakref.WeakSet[nn.Conv2d] = weakref.WeakSet()


def is_cut(first: nn.Conv2d) -> bool:
    """Whether the chain that begins with ``first`` was ever called inside of a DistributedDataParallel that holds it.

    A cut stays, whatever becomes of the recording or the wrapper: checkpointing calls the chain again in the backward,
    outside of the wrapper, and must find the same cuts. For the same reason no call in a backward makes a cut. Only a
    chain first cut between a checkpointed forward and its backward differs: PyTorch raises ``CheckpointError``.
    """
    if first in _cut:
        return True
    # Not public; TorchDynamo reads it, too. Without it chains stay whole.
    active = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if active is None or torch._C._current_graph_task_id() != -1:
        return False
    # All threads share the attribute: the wrapper may be that of another model.
    if all(p is not first.weight for p in active.parameters()):
        return False
    _cut.add(first)
    return True

"""Under DistributedDataParallel a chain is cut into stages, each an autograd function of its own.

An autograd function returns all its gradients at the end of its backward, and DistributedDataParallel sends a bucket of
gradients when it is complete. Cut into stages, a chain has its last stage's gradients sent while the first stages still
go backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch.nn.parallel import DistributedDataParallel

from ...ops.spec import ConvSpec
from .layers import block_ends

__all__ = ["GradientSender", "stages"]

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


class GradientSender:
    """The DistributedDataParallel that sends a chain's gradients, if any."""

    def __init__(self) -> None:
        self._module: weakref.ref[DistributedDataParallel] | None = None

    def exists(self) -> bool:
        """Whether the chain was called inside of one, which still lives.

        Checkpointing calls again from the backward, outside of it, and must find the same cuts.
        """
        # Not public; TorchDynamo reads it, too. Without it chains stay whole.
        active = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if active is not None:
            self._module = weakref.ref(active)
        return self._module is not None and self._module() is not None

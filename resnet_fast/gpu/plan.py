"""How the layers of a chain are packed for a GPU: which filters hold batch norm's scale, whose shift is added later.

A projection's result is read once, as the residual of a block's last convolution. Its shift is added there, to that
layer's own: a library's plain convolution then computes the projection without a pass over its result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.spec import DEFERRED, FOLDED, RELU, ConvSpec, shapes
from . import convolution as kernels
from .library import folds
from .packing import scale_shift

__all__ = ["deferred", "foldable", "planned"]


def deferred(specs: Sequence[ConvSpec]) -> dict[int, int]:
    """By layer whose shift is added later, the layer that adds it.

    Its result goes through no ReLU, has no residual, and is read by that layer alone, as a residual.
    """
    found = {}
    for i, spec in enumerate(specs[:-1]):
        readers = [j for j, other in enumerate(specs) if i + 1 in (other.source, other.residual)]
        if spec.residual < 0 and not spec.relu and len(readers) == 1 and specs[readers[0]].source != i + 1:
            found[i] = readers[0]
    return found


def foldable(sources: Sequence[Sequence[Tensor | None]], eps: Sequence[float], dtype: torch.dtype) -> list[bool]:
    """Of each layer, given by the sources of its pack, whether its filters may hold its scale. Waits for the device."""
    kept = []
    for (weight, *vectors), epsilon in zip(sources, eps, strict=True):
        assert weight is not None
        kept.append(folds(weight, scale_shift(weight, vectors, epsilon)[0], dtype))
    return torch.stack(kept).tolist()


def planned(specs: Sequence[ConvSpec], x: Tensor, folds: Sequence[bool]) -> list[ConvSpec]:
    """``specs`` with the flags of a GPU, for inputs like ``x``: folded where a library is the fastest choice.

    folds: of each layer, whether its filters may be.
    """
    later = deferred(specs)
    sizes = shapes(specs, x.shape[1:])
    found = [
        kernels.layer_of(
            *((x.shape[0], *sizes[spec.source]), (spec.out_channels, *spec.kernel), spec.stride, spec.padding, x.dtype),
            residual=spec.residual >= 0,
            relu=spec.relu,
            folded=folds[i],
            shifted=i not in later,
        )
        for i, spec in enumerate(specs)
    ]
    computed = [layer for layer in found if layer.pixels > 0]
    kernels.prepare(computed, x.device)
    out = []
    for i, (spec, layer) in enumerate(zip(specs, found, strict=True)):
        flags = spec.flags & RELU | (DEFERRED if i in later else 0)
        if folds[i] and layer.pixels > 0 and kernels.wants_folded(layer, x.device):
            flags |= FOLDED
        out.append(spec._replace(flags=flags))
    return out

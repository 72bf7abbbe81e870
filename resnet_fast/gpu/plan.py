"""How the layers of a chain are packed for a GPU: which filters have batch norm's scale folded in, which shifts move.

A projection's result is read once, as the residual of a block's last convolution. Its shift moves there and is added to
that layer's own, so that cuDNN's plain convolution computes the projection without another pass over its result.
:class:`.chain.GpuChain` calls it.
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
    """Layers whose shift is deferred, each with the layer that adds it.

    Such a layer has no ReLU and no residual, and one later layer alone reads its result, as a residual.
    """
    later = {}
    for i, spec in enumerate(specs[:-1]):
        readers = [j for j, other in enumerate(specs) if i + 1 in (other.source, other.residual)]
        if spec.residual < 0 and not spec.relu and len(readers) == 1 and specs[readers[0]].source != i + 1:
            later[i] = readers[0]
    return later


def foldable(sources: Sequence[Sequence[Tensor | None]], eps: Sequence[float], dtype: torch.dtype) -> list[bool]:
    """For each layer, whether its scale may be folded into its filters in ``dtype``. Waits for the device."""
    precise = []
    for (weight, *vectors), epsilon in zip(sources, eps, strict=True):
        assert weight is not None
        precise.append(folds(weight, scale_shift(weight, vectors, epsilon)[0], dtype))
    return torch.stack(precise).tolist()


def planned(specs: Sequence[ConvSpec], x: Tensor, folds: Sequence[bool]) -> list[ConvSpec]:
    """``specs`` with the flags of a GPU, for inputs like ``x``: FOLDED where cuDNN or cuBLASLt is fastest.

    folds: for each layer, whether its filters may be folded.
    """
    later = deferred(specs)
    sizes = shapes(specs, x.shape[1:])
    layers = [
        kernels.layer_of(
            *((x.shape[0], *sizes[spec.source]), (spec.out_channels, *spec.kernel), spec.stride, spec.padding, x.dtype),
            residual=spec.residual >= 0,
            relu=spec.relu,
            folded=folds[i],
            shifted=i not in later,
        )
        for i, spec in enumerate(specs)
    ]
    kernels.prepare([layer for layer in layers if layer.pixels > 0], x.device)
    flagged = []
    for i, (spec, layer) in enumerate(zip(specs, layers, strict=True)):
        flags = spec.flags & RELU | (DEFERRED if i in later else 0)
        if folds[i] and layer.pixels > 0 and kernels.wants_folded(layer, x.device):
            flags |= FOLDED
        flagged.append(spec._replace(flags=flags))
    return flagged

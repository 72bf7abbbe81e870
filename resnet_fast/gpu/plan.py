"""How the layers of a chain are packed for a GPU: which filters hold batch norm's scale, whose shift is added later.

A projection's result is read once, as the residual of a block's last convolution. Its shift is added there, to that
layer's own: a library's plain convolution then computes the projection without a pass over its result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fast import ops

__all__ = ["deferred", "foldable", "planned"]


def _rows(layers: Sequence[int]) -> list[Sequence[int]]:
    return [layers[i : i + ops.LAYER_FIELDS] for i in range(0, len(layers), ops.LAYER_FIELDS)]


def deferred(layers: Sequence[int]) -> dict[int, int]:
    """By layer whose shift is added later, the layer that adds it.

    Its result goes through no ReLU, has no residual, and is read by that layer alone, as a residual.
    """
    rows = _rows(layers)
    found = {}
    for i, (_, added, flags, *_) in enumerate(rows[:-1]):
        readers = [j for j, row in enumerate(rows) if i + 1 in row[:2]]
        if added < 0 and not flags & ops.RELU and len(readers) == 1 and rows[readers[0]][0] != i + 1:
            found[i] = readers[0]
    return found


def foldable(sources: Sequence[Sequence[Tensor | None]], eps: Sequence[float], dtype: torch.dtype) -> list[bool]:
    """Of each layer, given by the sources of its pack, whether its filters may hold its scale. Waits for the device."""
    from resnet_fast._triton.operators import scale_shift

    from .library import folds

    kept = []
    for (weight, *vectors), epsilon in zip(sources, eps, strict=True):
        assert weight is not None
        kept.append(folds(weight, scale_shift(weight, *vectors, epsilon)[0], dtype))
    return torch.stack(kept).tolist()


def planned(layers: Sequence[int], x: Tensor, folds: Sequence[bool]) -> list[int]:
    """``layers`` with the flags of ops.py, for inputs like ``x``: folded where a library is the fastest choice.

    folds: of each layer, whether its filters may be.
    """
    from resnet_fast._triton import layers as kernels

    later = deferred(layers)
    rows, shapes = _rows(layers), [tuple(x.shape)]
    found = []
    for i, (source, added, flags, k, *sizes) in enumerate(rows):
        kernel, stride, padding = sizes[:2], sizes[2:4], sizes[4:]
        layer = kernels.layer_of(
            *(shapes[source], (k, *kernel), stride, padding, x.dtype),
            residual=added >= 0,
            relu=bool(flags & ops.RELU),
            folded=folds[i],
            shifted=i not in later,
        )
        shapes.append((x.shape[0], k, layer.out_height, layer.out_width))
        found.append(layer)
    computed = [layer for layer in found if layer.pixels > 0]
    kernels.prepare(computed, x.device)
    out: list[int] = []
    for i, (row, layer) in enumerate(zip(rows, found, strict=True)):
        source, added, flags, *rest = row
        flags = flags & ops.RELU | (ops.DEFERRED if i in later else 0)
        if folds[i] and layer.pixels > 0 and kernels.wants_folded(layer, x.device):
            flags |= ops.FOLDED
        out += [source, added, flags, *rest]
    return out

"""A chain in inference: folds batch norm into the filters, packs them for each kernel, and calls the operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..backends.native import extension
from ..ops.spec import encode
from . import devices
from .cpu_algorithm import COMPACT_WINOGRAD, DIRECT, WINOGRAD, algorithms
from .guard import StalenessGuard
from .layout import stays_contiguous
from .record import ChainRecorder, eps_of, sources_of

__all__ = ["Chain"]


class Chain:
    """The convolutions of a module in eval mode, folded and packed; valid until the module changes."""

    owner: Any = None  # the module that caches it: a copied attribute must not serve another module

    def __init__(
        self,
        parts: list[nn.Module],
        recorder: ChainRecorder,
        opened: Mapping[nn.Module, Sequence[str]] | None = None,
        methods: Sequence[str] = ("forward",),
    ) -> None:
        self.specs = recorder.specs
        self.layers = encode(recorder.specs)
        self.pairs = recorder.pairs
        self.first_weight = recorder.pairs[0][0].weight
        self.dtype = self.first_weight.dtype
        # The guard comes before the weights are read: the next call sees a change in between.
        self._guard = StalenessGuard(parts, opened, methods=methods)
        self.sources = [sources_of(conv, bn) for conv, bn in recorder.pairs]
        self.eps = [eps_of(bn) for _, bn in recorder.pairs]
        self.stays_contiguous = stays_contiguous(self.specs, (conv.weight for conv, _ in recorder.pairs))
        self._packed: dict[tuple[int, int], Tensor] = {}  # by layer and algorithm
        self._filters: dict[tuple[Any, ...], list[Tensor]] = {}  # by input shape, dtype and switches

    @cached_property
    def gpu(self) -> Any:
        """The chain on GPUs."""
        return devices.gpu.chain(self.specs, self.sources, self.eps)

    def is_valid(self) -> bool:
        return self._guard.is_valid()

    def requires_grad(self) -> bool:
        return any(t is not None and t.requires_grad for sources in self.sources for t in sources)

    def algorithms(self, x: Tensor) -> list[int]:
        """The algorithm of each layer for inputs like ``x``, as :mod:`resnet_fast.chain.cpu_algorithm` names them."""
        if backends.kind(x) == "cuda":
            return [0] * len(self.pairs)
        return algorithms(self.specs, x.shape, x.dtype)

    def filters(self, x: Tensor, direct: bool = False) -> list[Tensor]:
        """Packed filters for inputs like ``x``; ``direct``: without Winograd's F(4x4).

        Threads that call this at once may pack a filter twice, which does no harm.
        """
        if backends.kind(x) == "cuda":
            return self.gpu.packed(x)[0]
        key = (x.shape, x.dtype, backends.cpu.allow_winograd, backends.cpu.allow_bf16_products, direct)
        filters = self._filters.get(key)
        if filters is None:
            filters = []
            for i, algorithm in enumerate(self.algorithms(x)):
                algorithm = DIRECT if direct and algorithm in (WINOGRAD, COMPACT_WINOGRAD) else algorithm
                packed = self._packed.get((i, algorithm))
                if packed is None:
                    packed = self._packed[i, algorithm] = self._pack(i, algorithm)
                filters.append(packed)
            self._filters[key] = filters
        return filters

    def _pack(self, layer: int, algorithm: int) -> Tensor:
        """A packed filter. Batch norm is folded in before any rounding to bfloat16."""
        weight, *vectors = self.sources[layer]
        with torch.no_grad():
            return torch.ops.resnet_fast.pack_conv_bn(weight, *vectors, self.eps[layer], algorithm)

    def pools(self, x: Tensor, pool: Sequence[int]) -> bool:
        """Whether :meth:`run` on ``x`` takes max pooling by ``pool``, too."""
        return backends.kind(x) != "cuda" or self.gpu.pools(x, pool)

    def run(self, x: Tensor, pool: Sequence[int] = ()) -> Tensor:
        """The chain on ``x``; pool: window, stride and padding of max pooling of its result."""
        if backends.kind(x) == "cuda":
            return self.gpu.run(x, pool)
        # No gradient flows through this call: skip the operator's autograd key, which runs Python.
        with torch._C._AutoDispatchBelowAutograd():
            y = torch.ops.resnet_fast.conv_chain(x, self.filters(x), self.layers, pool)
            # Winograd spreads a NaN over its whole tile, further than the filter's window: compute directly.
            if extension.take_spread():
                y = torch.ops.resnet_fast.conv_chain(x, self.filters(x, direct=True), self.layers, pool)
        return y

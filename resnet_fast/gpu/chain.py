"""A chain of convolutions on a GPU, in inference: chooses its form, packs its filters, runs or replays it.

Three forms: one launch a stage for chains of narrow stages; one launch for a stem with its pooling; else one launch a
convolution, each by the kernel chosen for its shape. :class:`resnet_fast.chain.inference.Chain` calls it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..ops.spec import FOLDED, ConvSpec, encode
from . import freshness, plan, residual_network, tune
from .cuda import stem as cuda_stem
from .layer import precision
from .operators import conv_chain, run_steps, steps
from .packing import packed, scale_shift
from .tape import Tapes

if TYPE_CHECKING:
    from .._triton.refresh_filters import PackedFilter

__all__ = ["GpuChain"]

Key = tuple[Any, ...]  # shape and dtype of the input, and the switches that decide


@dataclass(eq=False)
class _Filters:
    """Packed tensors for inputs of a kind and the specs with a GPU's flags.

    follower: keeps the tensors fresh. steps: of the operator ``conv_chain``. kept: by :func:`.freshness.keep`.
    """

    packed: list[Tensor]
    specs: Sequence[ConvSpec]
    follower: freshness.FilterFollower | None = None
    steps: list[Any] | None = None
    kept: bool = False


class GpuChain:
    """A chain packed for one state of the weights.

    sources, eps: for each convolution, the arguments of ``pack_conv_bn``.
    """

    def __init__(
        self, specs: Sequence[ConvSpec], sources: Sequence[Sequence[Tensor | None]], eps: Sequence[float]
    ) -> None:
        self.specs, self.sources, self.eps = specs, sources, eps
        self.layers = encode(specs)
        # By layer, folded, dtype, and whether they follow their weights.
        self._packed: dict[tuple[int, bool, torch.dtype, bool], tuple[Tensor, PackedFilter | None]] = {}
        self._made: dict[Key, _Filters] = {}
        self._foldable: dict[torch.dtype, list[bool]] = {}
        self._packing = threading.RLock()
        self.tapes = Tapes()

    def run(self, x: Tensor, pool: Sequence[int] = ()) -> Tensor:
        """The chain on ``x``; pool: window, stride and padding of max pooling that :meth:`pools` accepts."""
        return self.tapes.run(x, (*self._key(x), self._ahead(), tuple(pool)), lambda: self._run(x, pool))

    def _run(self, x: Tensor, pool: Sequence[int]) -> Tensor:
        if pool:
            return self._run_pooled(x, pool)
        stages = self.stages(x)
        return self.run_layers(x) if stages is None else self.run_stages(x, stages)

    def scores(
        self, x: Tensor, stages: tuple[residual_network.Stage, ...], head: tuple[Tensor, Tensor | None]
    ) -> Tensor:
        """:meth:`run_stages` with a head, replayed."""
        return self.tapes.run(x, (*self._key(x), self._ahead(), "scores"), lambda: self.run_stages(x, stages, head))

    def run_layers(self, x: Tensor) -> Tensor:
        """One launch a convolution. Caches the steps that the operator ``conv_chain`` derives at each call."""
        filters = self._planned(x)
        planned = filters.steps
        if planned is None:
            planned = steps(x, filters.packed, filters.specs)
            if not tune.capturing():
                filters.steps = planned
        return run_steps(x, planned)

    def run_stages(
        self,
        x: Tensor,
        stages: tuple[residual_network.Stage, ...],
        head: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """One launch for each of :meth:`stages`; head: weight and bias of the linear layer after average pooling."""
        classes = 0 if head is None else head[0].shape[0]

        def pack() -> _Filters:
            filters = [self._plain(i, x.dtype) for i in range(len(self.sources))]
            return _Filters([residual_network.pack(stages, filters, x.dtype, head)], self.specs)

        def follow(filters: _Filters) -> list[PackedFilter]:
            return freshness.followed_stages(filters.packed[0], stages, self.sources, self.eps, x.dtype, head)

        filters = self._fresh((x.shape[1:], x.dtype, classes, freshness.follows()), x, pack, follow)
        return residual_network.residual_network(x, filters.packed[0], self.layers, classes)

    def _run_pooled(self, x: Tensor, pool: Sequence[int]) -> Tensor:
        filters = self._one_by_one((x.dtype, freshness.follows()), x, lambda: self.specs)
        return conv_chain(x, filters.packed, self.layers, pool)

    def stages(self, x: Tensor) -> tuple[residual_network.Stage, ...] | None:
        """The stages of the chain, if each can run as one launch on the GPU of ``x`` and that is faster; else None."""
        if backends.selected() == "triton":
            return None
        found = residual_network.stages(self.layers, x.shape[1:], x.dtype)
        if found is None or not residual_network.runs(found, x.dtype):
            return None
        if x.shape[0] == 0 or not backends.has_kernel("conv_chain", "cuda"):
            return found
        forms: dict[str, Callable[[], object]] = {
            tune.STAGES: lambda: self.run_stages(x, found),
            tune.LAYERS: lambda: self.run_layers(x),
        }
        return found if self._first_is_fastest(x, "chain", forms) else None

    def stages_with_head(self, x: Tensor) -> tuple[residual_network.Stage, ...] | None:
        """:meth:`stages` where the last launch can go on through average pooling and a linear layer; else None."""
        found = self.stages(x)
        return found if found is not None and residual_network.has_head(found) else None

    def pools(self, x: Tensor, pool: Sequence[int]) -> bool:
        """Whether :meth:`run` on ``x`` can include max pooling by ``pool``, and that is faster."""
        if not backends.has_kernel("conv_bn_relu_pool_launch", "cuda") or backends.selected() == "triton":
            return False
        arithmetic = precision(x.dtype)
        if cuda_stem.pooled_layer(tuple(self.specs), x.shape, x.dtype, arithmetic, tuple(pool)) is None:
            return False
        # In 16 bits 3 to 5 times as fast as cuDNN's convolution and PyTorch's pooling, at any batch (an H200).
        if x.dtype != torch.float32 or x.shape[0] == 0:
            return True

        def apart() -> Tensor:
            return F.max_pool2d(self.run_layers(x), list(pool[:2]), list(pool[2:4]), list(pool[4:]))

        forms: dict[str, Callable[[], object]] = {tune.POOLED: lambda: self._run_pooled(x, pool), tune.LAYERS: apart}
        return self._first_is_fastest(x, f"{arithmetic} stem and pool {pool[0]}x{pool[1]}", forms)

    def _first_is_fastest(self, x: Tensor, kind: str, forms: dict[str, Callable[[], object]]) -> bool:
        """Whether the first of ``forms`` is the fastest, measured once on the GPU of ``x``."""
        name = f"{kind} {self._digest} {'x'.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')}"
        backend = "cuda" if backends.selected() == "cuda" else "auto"
        with freshness.measuring():
            return tune.tuner(x.device).choose_form(name, forms, backend) == next(iter(forms))

    @cached_property
    def _digest(self) -> str:
        """Identifies the chain in the tuner's cache file."""
        return sha256(repr(self.layers).encode()).hexdigest()[:12]

    def packed(self, x: Tensor) -> tuple[list[Tensor], list[ConvSpec]]:
        """Filters packed for the kernels chosen for inputs like ``x``, and the specs with their flags."""
        filters = self._planned(x)
        return filters.packed, list(filters.specs)

    def _planned(self, x: Tensor) -> _Filters:
        def specs() -> list[ConvSpec]:
            # Reading weights waits for the device, which a graph's capture forbids.
            folds = [False] * len(self.sources) if tune.capturing() else self._folds(x.dtype)
            return plan.planned(self.specs, x, folds)

        return self._one_by_one(self._key(x), x, specs)

    def _one_by_one(self, key: Key, x: Tensor, specs: Callable[[], Sequence[ConvSpec]]) -> _Filters:
        """A packed tensor for each of ``specs()``."""
        followed: list[PackedFilter] = []

        def pack() -> _Filters:
            flagged = specs()
            pairs = [self._filter(i, x.dtype, bool(spec.flags & FOLDED)) for i, spec in enumerate(flagged)]
            followed.extend(filters for _, filters in pairs if filters is not None)
            return _Filters([packed for packed, _ in pairs], flagged)

        return self._fresh(key, x, pack, lambda _: followed)

    def _fresh(
        self,
        key: Key,
        x: Tensor,
        pack: Callable[[], _Filters],
        follow: Callable[[_Filters], Sequence[PackedFilter]],
    ) -> _Filters:
        """``pack()``, once for each ``key``; from then on refreshed on the device, before it is read.

        A CUDA graph's capture that finds nothing packed packs within the graph, at each replay.
        """
        filters, captures = self._made.get(key), tune.capturing()
        if filters is None:
            with self._packing, torch.no_grad():
                if captures:
                    return pack()
                filters = self._made.get(key) or self._make(x, pack, follow)
                freshness.latest(self._made, key, filters)
        if filters.follower is not None:
            filters.follower.refresh()
        elif captures and not filters.kept:
            filters.kept = freshness.keep(self.sources[0][0], *filters.packed)
        return filters

    def _make(
        self, x: Tensor, pack: Callable[[], _Filters], follow: Callable[[_Filters], Sequence[PackedFilter]]
    ) -> _Filters:
        filters = pack()
        if freshness.follows():
            others = [other.follower for other in self._made.values()]
            filters.follower = freshness.follower(follow(filters), x.dtype, others)
        if x.is_cuda:  # other streams may read it from now on
            torch.cuda.current_stream(x.device).synchronize()
        return filters

    def _key(self, x: Tensor) -> Key:
        return x.shape, x.dtype, backends.selected(), precision(x.dtype), tune.forced(), freshness.follows()

    def _ahead(self) -> frozenset[freshness.FilterFollower | None]:
        """What decides, beside :meth:`_key`, whether a tape checks the filters."""
        return freshness.ahead(filters.follower for filters in [*self._made.values()])

    def _folds(self, dtype: torch.dtype) -> list[bool]:
        """For each layer, whether batch norm's scale may be folded into its filters."""
        if dtype not in self._foldable:
            self._foldable[dtype] = plan.foldable(self.sources, self.eps, dtype)
        return self._foldable[dtype]

    def _filter(self, layer: int, dtype: torch.dtype, folded: bool) -> tuple[Tensor, PackedFilter | None]:
        """A packed filter: without its shift if a later layer adds it, with the shifts that this layer adds; and what
        follows it."""
        key = (layer, folded, dtype, freshness.follows())
        captures = tune.capturing()
        found = None if captures else self._packed.get(key)
        if found is None:
            later = plan.deferred(self.specs)
            scale, shift = self._scale_shift(layer)
            other = next((i for i, reader in later.items() if reader == layer), None)
            shift = shift if other is None else shift + self._scale_shift(other)[1]
            weight = self.sources[layer][0]
            assert weight is not None
            shift = torch.zeros_like(shift) if layer in later else shift
            into = packed(weight, scale, shift, dtype, folded=folded)
            if captures:  # nothing is in it before the first replay
                return into, None
            filters = None
            if freshness.follows():
                added, eps = ((), 0.0) if other is None else (self.sources[other], self.eps[other])
                flags = {"folded": folded, "deferred": layer in later}
                filters = freshness.followed(into, self.sources[layer], added, (self.eps[layer], eps), dtype, **flags)
            found = self._packed[key] = into, filters
        return found

    def _plain(self, layer: int, dtype: torch.dtype) -> Tensor:
        """A packed filter with exactly its own scale and shift, for the kernels that run a stage a launch."""
        weight, *vectors = self.sources[layer]
        assert weight is not None
        scale, shift = scale_shift(weight.to(dtype), vectors, self.eps[layer])
        return packed(weight, scale, shift, dtype, folded=False)

    def _scale_shift(self, layer: int) -> tuple[Tensor, Tensor]:
        weight, *vectors = self.sources[layer]
        assert weight is not None
        return scale_shift(weight, vectors, self.eps[layer])

"""A whole network on a GPU in eval mode as one tape: one call into C++ from the images to the scores.

:class:`Replayed` is the mixin of the networks in :mod:`resnet_fast.models`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import backends
from ..chain.executor import ChainExecutor, autocast_dtype
from ..chain.guard import StalenessGuard, hooks_reason
from .tape import Tapes

__all__ = ["Network", "Replayed"]

_SIMPLE = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)


class Network(ChainExecutor):
    """``model(x)`` in eval mode, replayed until a module of it changes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._guard: StalenessGuard | None = None
        self._known = False  # whether the code of every module is known
        self._record_anew()

    def _record_anew(self) -> None:
        from .freshness import RefreshedNetwork  # which imports the tuner: this module is imported with the models

        self.tapes, self._refreshed = Tapes(), RefreshedNetwork()

    @property
    def training(self) -> bool:  # type: ignore[override]
        return self.model.training

    def run(self, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        autocast = autocast_dtype(x)
        if self.cannot_run(x, False, autocast) is not None or not self._is_valid():
            return forward(x)
        modes = (torch.backends.cudnn.allow_tf32, autocast, torch.is_inference_mode_enabled())
        kind = (backends.selected(), backends.cuda.check_weights, *modes)
        refreshed = self._refreshed
        return self.tapes.run(x, kind, lambda: refreshed.run((*kind, x.shape, x.dtype), lambda: forward(x)))

    def _is_valid(self) -> bool:
        if self._guard is None or not self._guard.is_valid():
            modules = list(self.model.modules())
            self._record_anew()
            # The guard compares what matters of the many simple layers anyway: open the others alone.
            self._guard = StalenessGuard(modules, {m: () for m in modules if type(m) not in _SIMPLE})
            self._known = hooks_reason(modules) is None and all(_is_known(m) and not m.training for m in modules)
        return self._known


def _is_known(module: nn.Module) -> bool:
    """Whether ``forward`` is a pure function of its input and of what the guard compares."""
    return type(module).__module__.startswith(("resnet_fast.", "torch.nn.modules."))


class Replayed(nn.Module):
    """Mixin: on a GPU in eval mode without gradients, replays ``forward`` of the class behind it as one tape."""

    _network: Network | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or torch.compiler.is_compiling():
            return super().forward(x)
        if backends.kind(x) != "cuda" or self.training or torch.is_grad_enabled():
            return super().forward(x)
        if self._network is None or self._network.model is not self:  # a replica of DataParallel's copies attributes
            self._network = Network(self)
        return self._network.run(x, super().forward)

"""The cached reason why a module runs unfused, so that falling back costs next to nothing over plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .. import backends
from ..backends import launch
from ..ops.arguments import DTYPES
from .guard import StalenessGuard
from .record import operator

__all__ = ["Refusal"]


class Refusal:
    """Why a module runs unfused; valid until something changes on which the reason depends."""

    owner: Any = None  # the module that caches it: a copied attribute must not serve another module

    def __init__(
        self,
        reason: str,
        parts: list[nn.Module],
        opened: Mapping[nn.Module, Sequence[str]],
        methods: Sequence[str],
        training: bool,
    ) -> None:
        self.reason = reason
        self._simulated = launch.is_simulated()
        tensors = (t for m in parts for store in (m._parameters, m._buffers) for t in store.values() if t is not None)
        # If kernels take all tensors, the reason is not about them: their classes and dtypes need no guard.
        kinds = not all(_is_usual(t, training) for t in tensors)
        self._guard = StalenessGuard(parts, opened, methods=methods, contents=False, kinds=kinds)

    def is_valid(self) -> bool:
        return self._simulated == launch.is_simulated() and self._guard.is_valid()


def _is_usual(t: Tensor, training: bool) -> bool:
    """Whether kernels take ``t``, so that the reason is not about it."""
    device = backends.kind(t)
    usual = type(t) in (Tensor, nn.Parameter) and backends.has_kernel(operator(training), device)
    return usual and (t.dtype in DTYPES.get(device, ()) or not t.is_floating_point())

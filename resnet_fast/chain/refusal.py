"""What is kept of a module that runs unfused: falling back must cost next to nothing over PyTorch's own operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .. import backends, launch
from ..ops.arguments import DTYPES
from .guard import StalenessGuard
from .record import operator

__all__ = ["Refusal"]


class Refusal:
    """Why a module runs unfused, for as long as all stays as it is on which that depends: recorded once, not a call."""

    owner: Any = None  # who keeps it: attributes may be copied to another module

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
        # A reason holds where tensors are as usual, too, if they are: then what they are need not be asked.
        kinds = not all(_is_usual(t, training) for t in tensors)
        self._guard = StalenessGuard(parts, opened, methods=methods, contents=False, kinds=kinds)

    def is_valid(self) -> bool:
        return self._simulated == launch.is_simulated() and self._guard.is_valid()


def _is_usual(t: Tensor, training: bool) -> bool:
    """Whether kernels take it, so that no reason is about it."""
    device = backends.kind(t)
    usual = type(t) in (Tensor, nn.Parameter) and backends.has_kernel(operator(training), device)
    return usual and (t.dtype in DTYPES.get(device, ()) or not t.is_floating_point())

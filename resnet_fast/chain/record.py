"""The builders that ``emit(builder, x)`` is called with.

:class:`ChainRecorder` records the dataflow as a chain of :class:`resnet_fast.ops.spec.ConvSpec`, or the reason why it
cannot be fused. :class:`EagerExecutor` runs it, a fused operator per convolution, where a compiler traces gradients.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from .. import backends
from ..ops.arguments import DTYPES
from ..ops.spec import RELU, ConvSpec
from ..ops.unfused import taps_reason
from . import patches
from .frozen_norm import FrozenNorm
from .guard import DROPOUTS, hooks_reason
from .sync_batch_norm import is_synchronized

__all__ = ["ChainRecorder", "EagerExecutor", "GraphBuilder", "eps_of", "operator", "sources_of", "structure_reason"]


_NONE = "None where a layer was"


class GraphBuilder(Protocol):
    """The interface that ``emit`` calls; to ``emit``, ``x`` and what ``conv`` returns are opaque."""

    def conv(self, conv: Any, bn: Any, x: Any, *, relu: nn.Module | None = None, residual: Any = None) -> Any:
        """``[relu](bn(conv(x)) [+ residual])``, if the modules are of the classes that their names say."""

    def block(self, block: nn.Module, x: Any) -> Any:
        """``block(x)``"""

    def needs(self, *layers: Any) -> None:
        """States that none of ``layers`` may be None: ``conv`` would take None for an absent layer."""

    def leftover(self, *layers: nn.Module) -> None:
        """States that ``layers`` are called, too: if there are any, the chain cannot be fused."""


def _fuses(module: nn.Module) -> bool:
    """Whether ``module`` is an :class:`.executor.FusedModule`, which falls back by itself."""
    return hasattr(type(module), "emit_is_forward")


def _padding(conv: nn.Conv2d) -> list[int] | None:
    """(height, width) of the zero padding; None where opposite sides differ."""
    if conv.padding == "valid":
        return [0, 0]
    if conv.padding == "same":
        odd = all(size % 2 == 1 for size in conv.kernel_size)
        return [size // 2 for size in conv.kernel_size] if odd else None
    return [int(p) for p in conv.padding]


def structure_reason(conv: nn.Module | None, bn: nn.Module | None, read: Container[nn.Module] = ()) -> str | None:
    """Why this convolution and batch norm cannot be fused in any mode, on any device, in any dtype; or None.

    read: modules whose code was read and found to be a batch norm's.
    """
    if conv is not None and type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} where a Conv2d was"
    known = type(bn) in (nn.BatchNorm2d, FrozenNorm) or is_synchronized(bn)
    if bn is not None and not known and bn not in read:
        return f"{type(bn).__name__} where a BatchNorm2d was"
    eps: Any = 0.0 if bn is None else bn.eps
    if not eps >= 0:
        return f"a batch norm with eps {eps}"  # PyTorch raises
    if conv is None:
        return None
    if isinstance(bn, FrozenNorm) and not bn.fits(conv.weight):
        return "a frozen batch norm of other channels or another dtype"
    if conv.groups != 1:
        return f"{conv.groups} groups"
    if conv.dilation != (1, 1):
        return f"dilation {conv.dilation}"
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode!r}"
    return "uneven padding" if _padding(conv) is None else taps_reason(conv.weight)


def _layer_reason(conv: Any, bn: nn.BatchNorm2d | None, training: bool) -> str | None:
    """Why this pair, whose structure can be fused, cannot be fused now for inference or for training; or None."""
    if bn is not None and bn.training and not training:
        return "batch norm in training mode"
    if bn is not None and bn.running_mean is None and not training:
        return "batch norm without running statistics"
    if bn is not None and (bn.running_mean is None) != (bn.running_var is None):
        return "batch norm with one of two running statistics"
    for part in (conv, bn):
        # A plain tensor, say of a hypernetwork: the guard would not see its changes.
        if isinstance(part, nn.Module) and ("weight" in part.__dict__ or "bias" in part.__dict__):
            return f"a {type(part).__name__} whose weight or bias is not a parameter"
    for t in sources_of(conv, bn):
        if t is None:
            continue
        # torch.export traces with fake tensors for weights.
        if type(t) not in (Tensor, nn.Parameter, FakeTensor):
            return f"weights of type {type(t).__name__}"
        device = backends.kind(t)
        if device not in DTYPES or not backends.has_kernel(operator(training), device):
            return f"no kernel for {device} tensors"
        if t.dtype not in DTYPES[device]:
            return f"no kernel for {t.dtype}"
    return None


def sources_of(conv: nn.Conv2d, bn: nn.BatchNorm2d | None) -> list[Tensor | None]:
    """The tensors that make a packed filter, in the order of ``pack_conv_bn``."""
    if bn is None:
        return [conv.weight, conv.bias, None, None, None, None]
    return [conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var]


def operator(training: bool) -> str:
    """The operator that a chain cannot run without."""
    return "conv_bn_stats" if training else "conv_chain"


class ChainRecorder:
    """Records a :class:`resnet_fast.ops.spec.ConvSpec` for each convolution, and its modules in ``pairs``."""

    def __init__(self, training: bool = False, structure: bool = False) -> None:
        """structure: check only what does not depend on mode, device and dtype."""
        self.training, self.structure = training, structure
        self.pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d | None]] = []
        self.specs: list[ConvSpec] = []
        self._stands_for: set[nn.Module] = set()
        self._read: set[nn.Module] = set()
        self._reasons: list[str] = []

    def conv(self, conv: Any, bn: Any, x: int, *, relu: nn.Module | None = None, residual: int | None = None) -> int:
        self._stands_for.update(m for m in (conv, bn, relu) if m is not None)
        reason = _NONE if conv is None else structure_reason(conv, bn, self._read)
        if reason is None and not self.structure:
            reason = _layer_reason(conv, bn, self.training)
        if reason is None and relu is not None and type(relu) is not nn.ReLU:
            reason = f"{type(relu).__name__} where a ReLU was"
        if reason is not None:
            self._reasons.append(reason)
            return 0
        self.pairs.append((conv, bn))
        added = -1 if residual is None else residual
        # As in F.conv2d, the weight's shape counts: pruning may leave out_channels and kernel_size unchanged.
        out_channels, _, *kernel = conv.weight.shape
        sizes: Any = [tuple(size) for size in (kernel, conv.stride, _padding(conv) or ())]
        self.specs.append(ConvSpec(x, added, 0 if relu is None else RELU, out_channels, *sizes))
        return len(self.pairs)

    def block(self, block: nn.Module, x: int) -> int:
        if not getattr(type(block), "emit_is_forward", False):
            self._reasons.append(f"{type(block).__name__}, whose dataflow is not known")
            return x
        emit: Any = block.emit
        return emit(self, x)

    def needs(self, *layers: Any) -> None:
        if any(layer is None for layer in layers):
            self._reasons.append(_NONE)

    def leftover(self, *layers: nn.Module) -> None:
        self._reasons += [_leftover(layer) for layer in layers]

    def through(self, modules: list[nn.Module], reason: str | None) -> None:
        """States that ``modules`` do nothing beyond what is recorded, unless ``reason`` says otherwise."""
        self._stands_for.update(modules)
        self._read.update(modules)
        if reason is not None:
            self._reasons.insert(0, reason)

    def reason(self, parts: list[nn.Module], methods: Sequence[str] = ("forward",)) -> str | None:
        """Why the chain cannot replace calls of all ``parts``, or None. methods: as :class:`.guard.StalenessGuard`."""
        if self._reasons:
            return self._reasons[0]
        if not self.pairs:
            return "no convolutions"
        for module in parts[1:]:
            if type(module) in DROPOUTS and isinstance(module, nn.modules.dropout._DropoutNd):
                if module.training and module.p > 0:
                    return f"a {type(module).__name__} in training mode"
            elif module not in self._stands_for and type(module) is not nn.Sequential and not _fuses(module):
                return _leftover(module)
        return hooks_reason(parts) or _patched(parts, methods)


def _patched(parts: list[nn.Module], methods: Sequence[str]) -> str | None:
    """Which method of ``parts`` was replaced by one that the chain does not know; or None."""
    if parts and (own := patches.own_method(parts[0], methods[1:])) is not None:
        return own
    asked: dict[type, None] = {}
    for i, module in enumerate(parts):
        kind = type(module)
        if i == 0 or kind not in asked:
            asked[kind] = None
            reason = patches.replaced(kind, methods if i == 0 else patches.methods(kind))
            if reason is not None:
                return reason
    return None if torch.compiler.is_compiling() else patches.call_replaced()


def _leftover(module: nn.Module) -> str:
    return f"a {type(module).__name__} that is not part of the pattern"


def eps_of(bn: nn.BatchNorm2d | None) -> float:
    return bn.eps if bn is not None else 0.0


class EagerExecutor:
    """Runs each convolution as a fused operator of its own, which autograd and the compiler can trace."""

    def conv(
        self, conv: Any, bn: Any, x: Tensor, *, relu: nn.Module | None = None, residual: Tensor | None = None
    ) -> Tensor:
        inputs = [x] if residual is None else [x, residual]
        name = "conv_bn_add_relu" if residual is not None else "conv_bn_relu" if relu is not None else "conv_bn"
        op = getattr(torch.ops.resnet_fast, name)
        return op(*inputs, *sources_of(conv, bn), eps_of(bn), list(conv.stride), _padding(conv))

    def block(self, block: Any, x: Tensor) -> Tensor:
        return block.emit(self, x)

    def needs(self, *layers: Any) -> None:
        """A :class:`ChainRecorder` has checked this."""

    def leftover(self, *layers: nn.Module) -> None:
        """A :class:`ChainRecorder` has checked this."""

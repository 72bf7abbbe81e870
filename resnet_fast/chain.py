"""Chains of convolutions: recorded from the dataflow of a block, folded and packed, kept fresh, run as one operator.

A fused module states its dataflow once, in ``flow(build, x)``, by calls of ``build.conv``. What ``build`` is decides
what happens: :class:`Recorder` writes the chain down, :class:`Layers` runs it convolution by convolution on the fused
operators (where gradients are traced), :class:`Unfused` on PyTorch's own (where a gradient is asked for afterwards).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as nn_module

from . import backends, ops
from .choose import tile_sizes
from .watch import Watch, hooks_reason, uncounted_reason

__all__ = ["Build", "Chain", "Fused"]


class Build(Protocol):
    """What ``flow`` is given; ``x`` and what ``conv`` returns are opaque to it."""

    def conv(
        self, conv: nn.Conv2d, bn: nn.BatchNorm2d | None, x: Any, *, relu: bool = False, residual: Any = None
    ) -> Any:
        """``[relu](bn(conv(x)) [+ residual])``"""


def _padding(conv: nn.Conv2d) -> list[int] | None:
    """Zeros on each side, or None where the sides differ."""
    if conv.padding == "valid":
        return [0, 0]
    if conv.padding == "same":
        odd = all(size % 2 == 1 for size in conv.kernel_size)
        return [size // 2 for size in conv.kernel_size] if odd else None
    return [int(p) for p in conv.padding]


def _layer_reason(conv: nn.Module, bn: nn.Module | None) -> str | None:
    """Why this pair cannot be fused, or None."""
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} where a Conv2d was"
    if bn is not None and type(bn) is not nn.BatchNorm2d:
        return f"{type(bn).__name__} where a BatchNorm2d was"
    if conv.groups != 1:
        return f"{conv.groups} groups"
    if conv.dilation != (1, 1):
        return f"dilation {conv.dilation}"
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode!r}"
    if _padding(conv) is None:
        return "uneven padding"
    if bn is not None and bn.training:
        return "batch norm in training mode"
    if bn is not None and bn.running_mean is None:
        return "batch norm without running statistics"
    for t in _sources(conv, bn):
        if t is None:
            continue
        if type(t) not in (Tensor, nn.Parameter):
            return f"weights of type {type(t).__name__}"
        if t.device.type != "cpu":
            return f"no kernel for {t.device.type} tensors"
        if t.dtype not in ops.DTYPES:
            return f"no kernel for {t.dtype}"
    return None


def _sources(conv: nn.Conv2d, bn: nn.BatchNorm2d | None) -> list[Tensor | None]:
    """What a packed filter is made of, in the order of ``pack_conv_bn``."""
    if bn is None:
        return [conv.weight, conv.bias, None, None, None, None]
    return [conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var]


class Recorder:
    """Writes the dataflow down as the integers that ``residual_stage`` reads. Values are numbered; 0 is the input."""

    def __init__(self) -> None:
        self.pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d | None]] = []
        self.layers: list[int] = []

    def conv(
        self, conv: nn.Conv2d, bn: nn.BatchNorm2d | None, x: int, *, relu: bool = False, residual: int | None = None
    ) -> int:
        self.pairs.append((conv, bn))
        pad = _padding(conv) if isinstance(conv, nn.Conv2d) else None
        if pad is not None:
            added = -1 if residual is None else residual
            self.layers += [x, added, int(relu), conv.out_channels, *conv.kernel_size, *conv.stride, *pad]
        return len(self.pairs)

    def reason(self) -> str | None:
        """Why the chain cannot run as one, or None."""
        return next((r for r in (_layer_reason(*pair) for pair in self.pairs) if r is not None), None)


def _pack(conv: nn.Conv2d, bn: nn.BatchNorm2d | None, tile: int) -> Tensor:
    eps = bn.eps if bn is not None else 0.0
    return torch.ops.resnet_fast.pack_conv_bn(*_sources(conv, bn), eps, tile)


class Layers:
    """Runs each convolution on its own fused operator, which autograd and the compiler can look into."""

    def conv(
        self,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None,
        x: Tensor,
        *,
        relu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        inputs = [x] if residual is None else [x, residual]
        name = "conv_bn_add_relu" if residual is not None else "conv_bn_relu" if relu else "conv_bn"
        op = getattr(torch.ops.resnet_fast, name)
        return op(*inputs, *_sources(conv, bn), bn.eps if bn is not None else 0.0, list(conv.stride), _padding(conv))


class Unfused:
    """Runs each convolution on PyTorch's own operators."""

    def conv(
        self,
        conv: nn.Conv2d,
        bn: nn.BatchNorm2d | None,
        x: Tensor,
        *,
        relu: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        y = conv(x) if bn is None else bn(conv(x))
        if residual is not None:
            y = y + residual
        return F.relu(y) if relu else y


class Chain:
    """The convolutions of a module in eval mode, folded and packed, for as long as the module stays as it is."""

    def __init__(self, owner: Fused, recorder: Recorder) -> None:
        self.layers = recorder.layers
        self.pairs = recorder.pairs
        self.dtype = recorder.pairs[0][0].weight.dtype
        # Watched before the weights are read: a change in between is seen at the next call.
        self._watch = Watch(owner.parts())
        self._packed: dict[tuple[int, int], Tensor] = {}  # by layer and tile size
        self._filters: dict[tuple[torch.Size, bool], list[Tensor]] = {}  # by shape of the input

    def fresh(self) -> bool:
        return self._watch.unchanged()

    def requires_grad(self) -> bool:
        return any(p.requires_grad for p in self._watch.parameters)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return self._watch.parameters

    def tiles(self, shape: torch.Size) -> list[int]:
        """The algorithm of each layer for inputs of ``shape``, as :mod:`resnet_fast.choose` names them."""
        return tile_sizes(self.layers, shape, self.dtype)

    def filters(self, shape: torch.Size) -> list[Tensor]:
        """Packed filters for inputs of ``shape``. Threads that come here at once may pack the same filter twice."""
        key = (shape, backends.cpu.allow_winograd)
        filters = self._filters.get(key)
        if filters is None:
            filters = []
            for i, tile in enumerate(self.tiles(shape)):
                packed = self._packed.get((i, tile))
                if packed is None:
                    packed = self._packed[i, tile] = _pack(*self.pairs[i], tile)
                filters.append(packed)
            self._filters[key] = filters
        return filters

    def run(self, x: Tensor) -> Tensor:
        return torch.ops.resnet_fast.residual_stage(x, self.filters(x.shape), self.layers)


class _Run(torch.autograd.Function):
    """A chain in eval mode whose gradient someone may want: fused forward; the backward runs it again, unfused.

    Nothing but the input is kept. Eval mode keeps no statistics, so running it again gives the same values.
    """

    @staticmethod
    def forward(
        ctx: Any, owner: Fused, chain: Chain, x: Tensor, autocast: torch.dtype | None, *params: Tensor
    ) -> Tensor:
        ctx.owner, ctx.autocast = owner, autocast
        ctx.save_for_backward(x, *params)
        return chain.run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *params = ctx.saved_tensors
        _, _, need_x, _, *need_params = ctx.needs_input_grad
        with torch.enable_grad(), torch.autocast("cpu", ctx.autocast, enabled=ctx.autocast is not None):
            x = x.detach().requires_grad_(need_x)
            y = ctx.owner.flow(Unfused(), x)
        wanted = [t for t, need in zip([x, *params], [need_x, *need_params], strict=True) if need]
        grads = iter(torch.autograd.grad(y, wanted, grad, allow_unused=True))
        grad_x, *grad_params = (next(grads) if need else None for need in [need_x, *need_params])
        return None, None, grad_x, None, *grad_params


class Fused(nn.Module):
    """Mixin: in eval mode, runs what :meth:`flow` states as one operator; otherwise, what the class behind it does."""

    _chain: Chain | None = None

    def flow(self, build: Build, x: Any) -> Any:
        """The dataflow from ``x`` to the result, by calls of ``build.conv`` alone."""
        raise NotImplementedError(f"{type(self).__name__}.flow")

    def parts(self) -> list[nn.Module]:
        """This module and every module that :meth:`flow` stands for: a change in one of them ends the chain."""
        return list(self.modules())

    def fused(self, x: Tensor) -> Tensor | None:
        """The result of the fused operator, or None where it cannot run, which ``backends.fallbacks`` then shows."""
        reason = self._call_reason(x)
        if reason is None and torch.compiler.is_compiling():
            return self._traced(x)
        chain = None if reason is not None else self._chain
        if reason is None and (chain is None or not chain.fresh()):
            recorder = Recorder()
            self.flow(recorder, 0)
            reason = recorder.reason() or hooks_reason(self.parts()) or uncounted_reason(self.parts())
            chain = self._chain = Chain(self, recorder) if reason is None else None
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        if chain is not None:
            if autocast is not None and torch.float64 not in (x.dtype, chain.dtype):
                x = x.to(autocast)
            elif x.dtype != chain.dtype:
                reason = f"{x.dtype} input, {chain.dtype} weights"
        if chain is None or reason is not None:
            backends.decline(type(self).__name__, reason or "")
            return None
        if torch.is_grad_enabled() and (x.requires_grad or chain.requires_grad()):
            return _Run.apply(self, chain, x, autocast, *chain.parameters)
        return chain.run(x)

    def _call_reason(self, x: Tensor) -> str | None:
        """Why this call cannot run fused, or None, as far as that does not depend on the weights."""
        if self.training:
            return "training mode"
        if backends.selected() == "eager":
            return "backends.use('eager')"
        if not backends.loaded():
            return "the extension is not loaded"
        if x.device.type != "cpu":
            return f"no kernel for {x.device.type} tensors"
        if x.dim() != 4:
            return f"an input of {x.dim()} dimensions"
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if dtype not in ops.DTYPES or x.dtype not in ops.DTYPES:
            return f"no kernel for {dtype}"
        if torch.compiler.is_compiling():
            return None
        if type(x) not in (Tensor, nn.Parameter):
            return f"an input of type {type(x).__name__}"
        if torch.jit.is_tracing():
            return "torch.jit.trace"
        if torch._C._are_functorch_transforms_active():
            return "a torch.func transform"
        if nn_module._has_any_global_hook():
            return "a global module hook"
        return None

    def _traced(self, x: Tensor) -> Tensor | None:
        """For the compiler: filters are packed in the graph, where freezing can fold them, and never go stale."""
        recorder = Recorder()
        self.flow(recorder, 0)
        reason = recorder.reason() or hooks_reason(self.parts())
        if reason is not None:
            backends.decline(type(self).__name__, reason)
            return None
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return self.flow(Layers(), x)
        tiles = tile_sizes(recorder.layers, x.shape, x.dtype)
        filters = [_pack(conv, bn, tile) for (conv, bn), tile in zip(recorder.pairs, tiles, strict=True)]
        return torch.ops.resnet_fast.residual_stage(x, filters, recorder.layers)

    def train(self, mode: bool = True) -> Fused:
        if mode != self.training:
            self._chain = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles pack for themselves: packed filters are as large as the weights and bound to this CPU."""
        return {name: value for name, value in self.__dict__.items() if name != "_chain"}

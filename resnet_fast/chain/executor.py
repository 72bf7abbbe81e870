"""Runs a module's dataflow as one operator: records the chain, packs it, checks that it is still valid, calls it.

A fused module states its dataflow once, in ``emit(builder, x)``, by calls of ``builder.conv`` (:mod:`.record`). Its
``forward`` calls :meth:`ChainExecutor.fused`, which returns the result, or None where PyTorch's operators must run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .. import backends
from ..ops.arguments import DTYPES
from ..ops.spec import ConvSpec, encode
from . import compiling, patches
from .cpu_algorithm import algorithm_of_filter
from .guard import StalenessGuard, touched
from .inference import Chain
from .layout import laid_out, stays_contiguous
from .plain import as_plain, plain_class
from .pooling import pooling_window
from .record import ChainRecorder, EagerExecutor, GraphBuilder, eps_of, operator, sources_of
from .refusal import Refusal
from .training.frozen import FrozenProgram, frozen
from .training.function import Program
from .training.unfused import UnfusedBackward

__all__ = ["ChainExecutor", "FusedModule", "autocast_dtype"]


# Attributes that cache what was recorded and packed.
_CACHES = ("_chain", "_program", "_eval_program", "_whole", "_network", "_observers")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the device of ``x``; None where autocast is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device in DTYPES and torch.is_autocast_enabled(device) else None


def _admitted(x: Tensor, weight: Tensor, autocast: torch.dtype | None) -> tuple[Tensor, str | None]:
    """``x`` in autocast's dtype, and why it does not fit the first ``weight``, or None."""
    if x.device != weight.device:
        return x, f"an input on {x.device}, weights on {weight.device}"
    if x.shape[1] != weight.shape[1]:
        return x, f"an input of {x.shape[1]} channels, weights for {weight.shape[1]}"
    if autocast is not None and torch.float64 not in (x.dtype, weight.dtype):
        return x.to(autocast), None
    return x, None if x.dtype == weight.dtype else f"{x.dtype} input, {weight.dtype} weights"


class ChainExecutor:
    """Runs what :meth:`emit` states as one operator."""

    _chain: Chain | Refusal | None = None  # in eval mode
    _program: Program | Refusal | None = None  # in training mode
    _eval_program: FrozenProgram | Refusal | None = None  # in eval mode where a gradient is wanted
    training: bool
    # Methods of the owner that :meth:`emit` replaces; the first is the one that is called.
    stands_for: ClassVar[tuple[str, ...]] = ("forward",)

    def emit(self, builder: GraphBuilder, x: Any) -> Any:
        """The dataflow from ``x`` to the result, by calls of ``builder`` alone."""
        raise NotImplementedError(f"{type(self).__name__}.emit")

    def parts(self) -> list[nn.Module]:
        """The owner, and every module that :meth:`emit` replaces: a change in one of them invalidates the chain."""
        raise NotImplementedError(f"{type(self).__name__}.parts")

    def opened(self) -> dict[nn.Module, list[str]]:
        """Parts whose code :meth:`emit` was read from, so that their attributes count; each with the names of
        attributes that the code looks up and the module lacks."""
        return {}

    def label(self) -> str:
        """The module's name in ``backends.fallbacks``."""
        return type(self).__name__

    def fused(self, x: Tensor, pool: nn.Module | None = None, *, channels_last: bool = False) -> Tensor | None:
        """The result of the fused operator, or None where it cannot run; ``backends.fallbacks`` counts that.

        pool: max pooling of the result, in the same operator where no gradient is wanted.
        channels_last: return the result as computed, not in the memory format that PyTorch would give it.
        """
        if not isinstance(x, Tensor) or (torch.compiler.is_compiling() and compiling.traced_unfused()):
            return None  # symbols of torch.fx, or a graph of PyTorch's operators
        refusal = self._refusal()
        if refusal is not None:
            return self._declined(refusal.reason)
        window = None if pool is None or self.training else pooling_window(pool)
        if pool is not None and (window is None or torch.compiler.is_compiling()):
            y = self.fused(x, channels_last=channels_last)
            return None if y is None else pool(y)
        autocast = autocast_dtype(x)
        if self.training:
            return self._trained(x, autocast, channels_last)
        if torch.compiler.is_compiling():
            return self._traced(x, autocast, channels_last)
        y = self._differentiable(x, autocast, channels_last) if torch.is_grad_enabled() else None
        if y is not None:
            return y if pool is None else pool(y)
        chain, x, reason = self.packed(x, autocast)
        if chain is None:
            return self._declined(reason)
        if torch.is_grad_enabled() and (x.requires_grad or chain.requires_grad()):
            y = UnfusedBackward.apply(chain, x, autocast, *(t for sources in chain.sources for t in sources))
            y = y if pool is None else pool(y)
        elif pool is not None and window is not None and not chain.pools(x, window):
            y = pool(chain.run(x))
        else:
            y = chain.run(x, window or ())
        return laid_out(y, x) if chain.stays_contiguous and not channels_last else y

    def _refusal(self) -> Refusal | None:
        """The recorded reason against running fused, if it still holds: asked first, because it is cheap."""
        if torch.compiler.is_compiling():  # the compiler would guard on every attribute read here
            return None
        cached = self._program if self.training else self._chain
        if not isinstance(cached, Refusal) or backends.selected() == "eager":
            return None
        return cached if cached.owner is self and cached.is_valid() else None

    def packed(self, x: Tensor, autocast: torch.dtype | None) -> tuple[Chain | None, Tensor, str | None]:
        """A valid chain and ``x`` in its dtype, packed anew if need be; or None, ``x`` and why not."""
        reason = self.cannot_run(x, False, autocast)
        if reason is not None:
            return None, x, reason
        chain = self._chain
        if chain is None or chain.owner is not self or not chain.is_valid():
            recorder = ChainRecorder()
            self.emit(recorder, 0)
            parts, opened = self.parts(), self.opened()
            reason = recorder.reason(parts, self.stands_for)
            if reason is None:
                chain = Chain(parts, recorder, opened, self.stands_for)
            else:
                chain = Refusal(reason, parts, opened, self.stands_for, False)
            chain.owner = self
            self._chain = chain
        if isinstance(chain, Refusal):
            return None, x, chain.reason
        x, reason = _admitted(x, chain.first_weight, autocast)
        return (chain if reason is None else None), x, reason

    def _declined(self, reason: str | None) -> Tensor | None:
        """Counts a fallback; no result."""
        backends.decline(self.label(), reason or "")
        return None

    def cannot_run(self, x: Tensor, training: bool, autocast: torch.dtype | None) -> str | None:
        """Why a call on ``x`` cannot run fused, whatever the weights; or None."""
        device = backends.kind(x)
        reason = backends.unfused_reason(operator(training), device)
        if reason is not None:
            return reason
        if device not in DTYPES:
            return f"no kernel for {device} tensors"
        if x.dim() != 4:
            return f"an input of {x.dim()} dimensions"
        if x.dtype not in DTYPES[device] or (autocast or x.dtype) not in DTYPES[device]:
            return f"no kernel for {autocast or x.dtype}"
        if torch.compiler.is_compiling():
            return None
        if type(x) not in (Tensor, nn.Parameter):
            return f"an input of type {type(x).__name__}"
        if x.layout != torch.strided:
            return f"an input of layout {x.layout}"
        if torch.jit.is_tracing():
            return "torch.jit.trace"
        if nn_module._has_any_global_hook():
            return "a global module hook"
        return backends.transform_reason()

    def _trained(self, x: Tensor, autocast: torch.dtype | None, channels_last: bool) -> Tensor | None:
        """In training mode: one autograd function."""
        program, x, reason = self._programmed(x, autocast)
        if program is None:
            return self._declined(reason)
        y = program.run(x)
        return y if channels_last else self._laid_out(y, x, program.specs, program.pairs)

    def _programmed(self, x: Tensor, autocast: torch.dtype | None) -> tuple[Program | None, Tensor, str | None]:
        """The chain as an autograd function and ``x`` in its dtype; or None, ``x`` and why not.

        A recording is valid until a module changes; changed weights do not matter, they are packed at every step.
        """
        reason = self.cannot_run(x, True, autocast)
        if reason is not None:
            return None, x, reason
        program = None if torch.compiler.is_compiling() else self._program
        if program is None or program.owner is not self or not program.is_valid():
            recorder = ChainRecorder(training=True)
            self.emit(recorder, 0)
            program = Program(recorder.pairs, recorder.specs)
            if not torch.compiler.is_compiling() and frozen(program):
                program = FrozenProgram(recorder.pairs, recorder.specs)
            parts, opened = self.parts(), self.opened()
            reason = recorder.reason(parts, self.stands_for) or program.reason()
            if torch.compiler.is_compiling():
                if reason is not None:
                    return None, x, reason
            else:
                if reason is not None:
                    program = Refusal(reason, parts, opened, self.stands_for, True)
                else:
                    program.guard = StalenessGuard(parts, opened, methods=self.stands_for, contents=False)
                program.owner = self
                self._program = program
        if isinstance(program, Refusal):
            return None, x, program.reason
        if not torch.compiler.is_compiling() and not program.statistics.writable():
            return None, x, "statistics made in inference mode, outside of it"  # PyTorch raises
        x, reason = _admitted(x, program.pairs[0][0].weight, autocast)
        reason = reason or program.reason_for(x)
        return (program if reason is None else None), x, reason

    def _differentiable(self, x: Tensor, autocast: torch.dtype | None, channels_last: bool) -> Tensor | None:
        """In eval mode where a gradient is wanted: the result of an autograd function with a fused backward.

        None where no gradient is wanted after all, or only :class:`UnfusedBackward` can run the chain.
        """
        on_cpu = backends.kind(x) == "cpu"
        if self.cannot_run(x, not on_cpu, autocast) is not None or (x.numel() == 0 and not on_cpu):
            return None
        program = self._eval_program
        if program is None or program.owner is not self or not program.is_valid():
            program = self._recorded()
            program.owner = self
            self._eval_program = program
        if isinstance(program, Refusal) or not (x.requires_grad or program.requires_grad()):
            return None
        x, reason = _admitted(x, program.pairs[0][0].weight, autocast)
        if reason is not None:
            return None
        y = program.run(x)
        return y if channels_last else self._laid_out(y, x, program.specs, program.pairs)

    def _recorded(self) -> FrozenProgram | Refusal:
        recorder = ChainRecorder()
        self.emit(recorder, 0)
        program, parts, opened = FrozenProgram(recorder.pairs, recorder.specs), self.parts(), self.opened()
        reason = recorder.reason(parts, self.stands_for) or program.reason()
        if reason is not None:
            return Refusal(reason, parts, opened, self.stands_for, False)
        program.guard = StalenessGuard(parts, opened, methods=self.stands_for, contents=False)
        return program

    @staticmethod
    def _laid_out(y: Tensor, x: Tensor, specs: Sequence[ConvSpec], pairs: Sequence[tuple[nn.Conv2d, Any]]) -> Tensor:
        return laid_out(y, x) if stays_contiguous(specs, (conv.weight for conv, _ in pairs)) else y

    def _traced(self, x: Tensor, autocast: torch.dtype | None, channels_last: bool) -> Tensor | None:
        """For the compiler: the graph packs the filters, so they are never stale, and freezing can fold them."""
        recorder = ChainRecorder()
        reason = self.cannot_run(x, False, autocast)
        if reason is None:
            self.emit(recorder, 0)
            reason = recorder.reason(self.parts(), self.stands_for)
        if reason is not None:
            return self._declined(reason)
        if torch.is_grad_enabled() or autocast is not None:
            y = self.emit(EagerExecutor(), x)
            return y if channels_last else self._laid_out(y, x, recorder.specs, recorder.pairs)
        filters = [
            torch.ops.resnet_fast.pack_conv_bn(
                *sources_of(conv, bn),
                eps_of(bn),
                0 if backends.kind(x) == "cuda" else algorithm_of_filter(conv.weight, conv.stride),
            )
            for conv, bn in recorder.pairs
        ]
        y = torch.ops.resnet_fast.conv_chain(x, filters, encode(recorder.specs))
        return y if channels_last else self._laid_out(y, x, recorder.specs, recorder.pairs)


class FusedModule(ChainExecutor, nn.Module):
    """Mixin for a module whose ``forward`` calls :meth:`fused`, and falls back to the class behind it."""

    emit_is_forward: ClassVar[bool] = False  # whether emit and forward come from the same class, and so agree
    _whole: Any = None  # networks only: see whole.py
    _observers: Any = None  # networks only: see layout.py

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "emit" in vars(cls) or "forward" in vars(cls):
            cls.emit_is_forward = "emit" in vars(cls) and "forward" in vars(cls)
        patches.register(cls)

    def parts(self) -> list[nn.Module]:
        return list(self.modules())

    def train(self, mode: bool = True) -> FusedModule:
        if mode != self.training:
            for name in _CACHES:
                self.__dict__.pop(name, None)
        touched(self)
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Called by ``load_state_dict`` of this module and of modules around it."""
        super()._load_from_state_dict(*args, **kwargs)
        touched(self)

    def __prepare_scriptable__(self) -> nn.Module:
        """The module that ``torch.jit.script`` compiles instead."""
        return as_plain(self, plain_class(type(self)), _CACHES)

    def __getstate__(self) -> dict[str, Any]:
        """Drops the caches: packed filters are as large as the weights and made for this CPU."""
        return {name: value for name, value in self.__dict__.items() if name not in _CACHES}

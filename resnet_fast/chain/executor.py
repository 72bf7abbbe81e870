"""Chains of convolutions: recorded from the dataflow of a block, folded and packed, kept fresh, run as one operator.

A fused module states its dataflow once, in ``emit(builder, x)``, by calls of ``builder.conv`` (:mod:`.record`).
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


# What modules keep of what they were packed for.
_KEPT = ("_chain", "_program", "_eval_program", "_whole", "_network", "_observers")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants on the device of ``x``, None where it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device in DTYPES and torch.is_autocast_enabled(device) else None


def _admitted(x: Tensor, weight: Tensor, autocast: torch.dtype | None) -> tuple[Tensor, str | None]:
    """``x`` in the dtype that autocast wants, and why it cannot meet the first of the weights, or None."""
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
    # Of the owner's, those that :meth:`emit` stands for; the first of them is what a call comes through.
    stands_for: ClassVar[tuple[str, ...]] = ("forward",)

    def emit(self, builder: GraphBuilder, x: Any) -> Any:
        """The dataflow from ``x`` to the result, by calls of ``builder`` alone."""
        raise NotImplementedError(f"{type(self).__name__}.emit")

    def parts(self) -> list[nn.Module]:
        """The owner, and every module that :meth:`emit` stands for: a change in one of them ends the chain."""
        raise NotImplementedError(f"{type(self).__name__}.parts")

    def opened(self) -> dict[nn.Module, list[str]]:
        """Those of the parts whose attributes count, because :meth:`emit` was read from their code; each with the
        attributes that the code asks for and that it lacks."""
        return {}

    def label(self) -> str:
        """The name in ``backends.fallbacks``"""
        return type(self).__name__

    def fused(self, x: Tensor, pool: nn.Module | None = None, *, channels_last: bool = False) -> Tensor | None:
        """The result of the fused operator, or None where it cannot run, which ``backends.fallbacks`` then shows.

        pool: max pooling that takes the result, by the same operator where no gradient is wanted.
        channels_last: the result is left as it is computed, not laid out as PyTorch's own operators would do it.
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
        """What is known to keep the module from running fused, before anything else is asked."""
        if torch.compiler.is_compiling():  # which would guard on what it looks at
            return None
        kept = self._program if self.training else self._chain
        if not isinstance(kept, Refusal) or backends.selected() == "eager":
            return None
        return kept if kept.owner is self and kept.is_valid() else None

    def packed(self, x: Tensor, autocast: torch.dtype | None) -> tuple[Chain | None, Tensor, str | None]:
        """The chain as it is now and ``x`` in the dtype that it takes, or None, ``x`` and why not."""
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
        """No result, which is counted."""
        backends.decline(self.label(), reason or "")
        return None

    def cannot_run(self, x: Tensor, training: bool, autocast: torch.dtype | None) -> str | None:
        """Why a call cannot run fused, or None, as far as that does not depend on the weights."""
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
        """The chain as an autograd function and ``x`` in the dtype that it takes, or None, ``x`` and why not.

        What was recorded holds until a module changes, not a weight.
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
            return None, x, "statistics made in inference mode, outside of it"  # PyTorch says what it allows
        x, reason = _admitted(x, program.pairs[0][0].weight, autocast)
        if x.numel() == 0:
            reason = reason or "an empty input"
        return (program if reason is None else None), x, reason

    def _differentiable(self, x: Tensor, autocast: torch.dtype | None, channels_last: bool) -> Tensor | None:
        """In eval mode, where a gradient is wanted: the result of a function whose backward is fused, or None.

        None, too, of what such a program cannot stand for: that has :class:`UnfusedBackward`.
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
        """For the compiler: filters are packed in the graph, where freezing can fold them, and never go stale."""
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
        y = torch.ops.resnet_fast.residual_stage(x, filters, encode(recorder.specs))
        return y if channels_last else self._laid_out(y, x, recorder.specs, recorder.pairs)


class FusedModule(ChainExecutor, nn.Module):
    """Mixin: in eval mode, runs what :meth:`emit` states as one operator; otherwise, what the class behind it does."""

    emit_is_forward: ClassVar[bool] = False  # the class that defines forward also says what it does
    _whole: Any = None  # of networks: see whole.py
    _observers: Any = None  # of networks: see layout.py

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "emit" in vars(cls) or "forward" in vars(cls):
            cls.emit_is_forward = "emit" in vars(cls) and "forward" in vars(cls)
        patches.register(cls)

    def parts(self) -> list[nn.Module]:
        return list(self.modules())

    def train(self, mode: bool = True) -> FusedModule:
        if mode != self.training:
            for name in _KEPT:
                self.__dict__.pop(name, None)
        touched(self)
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """By ``load_state_dict`` of this module and of those around it."""
        super()._load_from_state_dict(*args, **kwargs)
        touched(self)

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles instead."""
        return as_plain(self, plain_class(type(self)), _KEPT)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles pack for themselves: packed filters are as large as the weights and bound to this CPU."""
        return {name: value for name, value in self.__dict__.items() if name not in _KEPT}

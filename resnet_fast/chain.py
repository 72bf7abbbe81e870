"""Chains of convolutions: recorded from the dataflow of a block, folded and packed, kept fresh, run as one operator.

A fused module states its dataflow once, in ``flow(build, x)``, by calls of ``build.conv``. What ``build`` is decides
what happens: :class:`Recorder` writes the chain down, :class:`Layers` runs it convolution by convolution on the fused
operators (where gradients are traced).
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as nn_module

from . import backends, ops, residual_network
from .choose import algorithm_of_filter, algorithms
from .pooling import pooling_window
from .training import Program
from .watch import DROPOUTS, Watch, hooks_reason, uncounted_reason

__all__ = ["Build", "Chain", "Fused", "Fusing", "Recorder", "structure_reason"]


class Build(Protocol):
    """What ``flow`` is given; ``x`` and what ``conv`` returns are opaque to it."""

    def conv(self, conv: Any, bn: Any, x: Any, *, relu: nn.Module | None = None, residual: Any = None) -> Any:
        """``[relu](bn(conv(x)) [+ residual])``, if the modules are what they are called."""

    def block(self, block: nn.Module, x: Any) -> Any:
        """``block(x)``"""


def _padding(conv: nn.Conv2d) -> list[int] | None:
    """Zeros on each side, or None where the sides differ."""
    if conv.padding == "valid":
        return [0, 0]
    if conv.padding == "same":
        odd = all(size % 2 == 1 for size in conv.kernel_size)
        return [size // 2 for size in conv.kernel_size] if odd else None
    return [int(p) for p in conv.padding]


def structure_reason(conv: nn.Module | None, bn: nn.Module | None, read: Container[nn.Module] = ()) -> str | None:
    """Why no pair with this convolution and batch norm can be fused, whatever mode, device and dtype; or None.

    Of the modules in ``read`` the code was read, and found to be a batch norm's.
    """
    if conv is not None and type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} where a Conv2d was"
    if bn is not None and type(bn) is not nn.BatchNorm2d and bn not in read:
        return f"{type(bn).__name__} where a BatchNorm2d was"
    if conv is None:
        return None
    if conv.groups != 1:
        return f"{conv.groups} groups"
    if conv.dilation != (1, 1):
        return f"dilation {conv.dilation}"
    if conv.padding_mode != "zeros":
        return f"padding mode {conv.padding_mode!r}"
    return "uneven padding" if _padding(conv) is None else None


def _layer_reason(conv: Any, bn: nn.BatchNorm2d | None, training: bool, read: Container[nn.Module] = ()) -> str | None:
    """Why this pair cannot be fused as it is now, for inference or for training, or None."""
    reason = structure_reason(conv, bn, read)
    if reason is not None:
        return reason
    if bn is not None and bn.training and not training:
        return "batch norm in training mode"
    if bn is not None and bn.running_mean is None and not training:
        return "batch norm without running statistics"
    for part in (conv, bn):
        # A tensor that is no parameter, say of a hypernetwork: its changes are not watched.
        if part is not None and ("weight" in part.__dict__ or "bias" in part.__dict__):
            return f"a {type(part).__name__} whose weight or bias is not a parameter"
    for t in _sources(conv, bn):
        if t is None:
            continue
        # torch.export traces with fake tensors in the place of the weights.
        if type(t) not in (Tensor, nn.Parameter, FakeTensor):
            return f"weights of type {type(t).__name__}"
        device = backends.kind(t)
        if device not in ops.DTYPES or not backends.has_kernel(_operator(training), device):
            return f"no kernel for {device} tensors"
        if t.dtype not in ops.DTYPES[device]:
            return f"no kernel for {t.dtype}"
    return None


def _sources(conv: nn.Conv2d, bn: nn.BatchNorm2d | None) -> list[Tensor | None]:
    """What a packed filter is made of, in the order of ``pack_conv_bn``."""
    if bn is None:
        return [conv.weight, conv.bias, None, None, None, None]
    return [conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var]


def _operator(training: bool) -> str:
    """The operator without which a chain cannot run."""
    return "conv_moments" if training else "residual_stage"


class Recorder:
    """Writes the dataflow down as the integers that ``residual_stage`` reads. Values are numbered; 0 is the input."""

    def __init__(self, training: bool = False) -> None:
        self.training = training
        self.pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d | None]] = []
        self.layers: list[int] = []
        self._stands_for: set[nn.Module] = set()
        self._read: set[nn.Module] = set()
        self._reasons: list[str] = []

    def conv(self, conv: Any, bn: Any, x: int, *, relu: nn.Module | None = None, residual: int | None = None) -> int:
        self._stands_for.update(m for m in (conv, bn, relu) if m is not None)
        reason = _layer_reason(conv, bn, self.training, self._read)
        if reason is None and relu is not None and type(relu) is not nn.ReLU:
            reason = f"{type(relu).__name__} where a ReLU was"
        if reason is not None:
            self._reasons.append(reason)
            return 0
        self.pairs.append((conv, bn))
        added = -1 if residual is None else residual
        # The weight's own shape counts, as in F.conv2d: who prunes channels may leave the attributes as they were.
        out_channels, _, *kernel = conv.weight.shape
        self.layers += [x, added, int(relu is not None), out_channels, *kernel, *conv.stride, *(_padding(conv) or ())]
        return len(self.pairs)

    def block(self, block: nn.Module, x: int) -> int:
        if not isinstance(block, Fused) or not block.flow_is_forward:
            self._reasons.append(f"{type(block).__name__}, whose dataflow is not known")
            return x
        return block.flow(self, x)

    def through(self, modules: list[nn.Module], reason: str | None) -> None:
        """``modules`` do nothing beside what is recorded, unless there is a ``reason`` why they might."""
        self._stands_for.update(modules)
        self._read.update(modules)
        if reason is not None:
            self._reasons.insert(0, reason)

    def reason(self, parts: list[nn.Module]) -> str | None:
        """Why the chain cannot stand for all of ``parts``, or None."""
        if self._reasons:
            return self._reasons[0]
        if not self.pairs:
            return "no convolutions"
        for module in parts[1:]:
            if type(module) in DROPOUTS and isinstance(module, nn.modules.dropout._DropoutNd):
                if module.training and module.p > 0:
                    return f"a {type(module).__name__} in training mode"
            elif module not in self._stands_for and type(module) is not nn.Sequential and not isinstance(module, Fused):
                return f"a {type(module).__name__} that is not part of the pattern"
        return hooks_reason(parts)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants on the device of ``x``, None where it is off."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device in ops.DTYPES and torch.is_autocast_enabled(device) else None


def _admitted(
    x: Tensor, dtype: torch.dtype, device: torch.device, autocast: torch.dtype | None
) -> tuple[Tensor, str | None]:
    """``x`` in the dtype that autocast wants, and why it cannot meet weights of this dtype on this device, or None."""
    if x.device != device:
        return x, f"an input on {x.device}, weights on {device}"
    if autocast is not None and torch.float64 not in (x.dtype, dtype):
        return x.to(autocast), None
    return x, None if x.dtype == dtype else f"{x.dtype} input, {dtype} weights"


def _eps(bn: nn.BatchNorm2d | None) -> float:
    return bn.eps if bn is not None else 0.0


class Layers:
    """Runs each convolution on its own fused operator, which autograd and the compiler can look into."""

    def conv(
        self, conv: Any, bn: Any, x: Tensor, *, relu: nn.Module | None = None, residual: Tensor | None = None
    ) -> Tensor:
        inputs = [x] if residual is None else [x, residual]
        name = "conv_bn_add_relu" if residual is not None else "conv_bn_relu" if relu is not None else "conv_bn"
        op = getattr(torch.ops.resnet_fast, name)
        return op(*inputs, *_sources(conv, bn), _eps(bn), list(conv.stride), _padding(conv))

    def block(self, block: Any, x: Tensor) -> Tensor:
        return block.flow(self, x)


class Chain:
    """The convolutions of a module in eval mode, folded and packed, for as long as the module stays as it is."""

    def __init__(self, parts: list[nn.Module], recorder: Recorder, opened: Sequence[nn.Module] = ()) -> None:
        self.layers = recorder.layers
        self.pairs = recorder.pairs
        self.dtype = recorder.pairs[0][0].weight.dtype
        self.device = recorder.pairs[0][0].weight.device
        # Watched before the weights are read: a change in between is seen at the next call.
        self._watch = Watch(parts, opened)
        self.sources = [_sources(conv, bn) for conv, bn in recorder.pairs]
        self.eps = [_eps(bn) for _, bn in recorder.pairs]
        self._packed: dict[tuple[int, int, torch.dtype], Tensor] = {}  # by layer, algorithm and dtype
        self._filters: dict[tuple[torch.Size, torch.dtype, bool, bool], list[Tensor]] = {}  # by what the input is
        self._networks: dict[tuple[torch.Size, torch.dtype, int], Tensor] = {}  # likewise, and by classes

    def fresh(self) -> bool:
        return self._watch.unchanged()

    def requires_grad(self) -> bool:
        return any(t is not None and t.requires_grad for sources in self.sources for t in sources)

    def algorithms(self, x: Tensor) -> list[int]:
        """The algorithm of each layer for inputs like ``x``, as :mod:`resnet_fast.choose` names them."""
        if backends.kind(x) == "cuda":
            return [0] * len(self.pairs)
        return algorithms(self.layers, x.shape, x.dtype)

    def filters(self, x: Tensor) -> list[Tensor]:
        """Packed filters for inputs like ``x``. Threads that come here at once may pack the same filter twice."""
        key = (x.shape, x.dtype, backends.cpu.allow_winograd, backends.cpu.allow_bf16_products)
        filters = self._filters.get(key)
        if filters is None:
            # GPUs multiply in the dtype of the images; CPUs round weights, if at all, after batch norm is folded in.
            dtype = x.dtype if backends.kind(x) == "cuda" else self.dtype
            filters = []
            for i, algorithm in enumerate(self.algorithms(x)):
                packed = self._packed.get((i, algorithm, dtype))
                if packed is None:
                    packed = self._packed[i, algorithm, dtype] = self._pack(i, dtype, algorithm)
                filters.append(packed)
            self._filters[key] = filters
        return filters

    def stages(self, x: Tensor) -> tuple[residual_network.Stage, ...] | None:
        """The stages of the chain where each can run as one launch on the GPU of ``x``."""
        if backends.kind(x) != "cuda" or backends.selected() == "triton":
            return None
        found = residual_network.stages(self.layers, x.shape[1:], x.dtype)
        if found is None or not residual_network.runs(found, x.dtype):
            return None
        return found if self._in_stages(x, found) else None

    def _in_stages(self, x: Tensor, stages: tuple[residual_network.Stage, ...]) -> bool:
        """Whether a launch a stage is faster here than a launch a convolution: measured once on the GPU of ``x``."""
        if x.shape[0] == 0 or not backends.has_kernel("residual_stage", "cuda"):
            return True
        from ._triton.tune import FORMS, tuner

        forms = dict(zip(FORMS, (lambda: self.run_stages(x, stages), lambda: self._run_layers(x)), strict=True))
        chain = f"chain {self._digest} {'x'.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')}"
        backend = backends.selected()
        return tuner(x.device).choose_form(chain, forms, backend if backend == "cuda" else "auto") == FORMS[0]

    @cached_property
    def _digest(self) -> str:
        """Names the chain's shape in the file of what was measured."""
        return sha256(repr(self.layers).encode()).hexdigest()[:12]

    def run_stages(
        self,
        x: Tensor,
        stages: tuple[residual_network.Stage, ...],
        head: tuple[Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """A launch for each of :meth:`stages`; head: weight and bias of the linear layer behind average pooling."""
        classes = 0 if head is None else head[0].shape[0]
        key = (x.shape[1:], x.dtype, classes)
        packed = self._networks.get(key)
        if packed is None:
            with torch.no_grad():
                filters = [self._pack(i, x.dtype, 0) for i in range(len(self.pairs))]
                packed = self._networks[key] = residual_network.pack(stages, filters, x.dtype, head)
        return torch.ops.resnet_fast.residual_network(x, packed, self.layers, classes)

    def _pack(self, layer: int, dtype: torch.dtype, algorithm: int) -> Tensor:
        weight, *vectors = self.sources[layer]
        assert weight is not None
        with torch.no_grad():
            return torch.ops.resnet_fast.pack_conv_bn(weight.to(dtype), *vectors, self.eps[layer], algorithm)

    def run(self, x: Tensor, pool: Sequence[int] = ()) -> Tensor:
        """The chain on ``x``; pool: window, stride and padding of max pooling behind it."""
        stages = None if pool else self.stages(x)
        if stages is not None:
            return self.run_stages(x, stages)
        return self._run_layers(x, pool)

    def _run_layers(self, x: Tensor, pool: Sequence[int] = ()) -> Tensor:
        return torch.ops.resnet_fast.residual_stage(x, self.filters(x), self.layers, pool)


class _Run(torch.autograd.Function):
    """A chain in eval mode whose gradient someone may want: fused forward; the backward runs it again, unfused.

    Kept are the input and the tensors that the chain was packed from, not the module, which may be in training mode or
    changed in other ways by then. Eval mode keeps no statistics, so running it again gives the same values.
    """

    @staticmethod
    def forward(ctx: Any, chain: Chain, x: Tensor, autocast: torch.dtype | None, *sources: Tensor | None) -> Tensor:
        ctx.layers, ctx.eps, ctx.autocast = chain.layers, chain.eps, (x.device.type, autocast)
        ctx.save_for_backward(x, *sources)
        return chain.run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, need_x, _, *need_sources = ctx.needs_input_grad
        needed = [need_x, *need_sources]
        device, dtype = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled=dtype is not None):
            leaves: list[Any] = [
                None if t is None else t.detach().requires_grad_(need)
                for t, need in zip(ctx.saved_tensors, needed, strict=True)
            ]
            y = _unfused(ctx.layers, ctx.eps, *leaves)
        wanted = [t for t, need in zip(leaves, needed, strict=True) if need]
        grads = iter(torch.autograd.grad(y, wanted, grad))
        grad_x, *grad_sources = (next(grads) if need else None for need in needed)
        return None, grad_x, None, *grad_sources


def _unfused(layers: list[int], eps: list[float], x: Tensor, *sources: Any) -> Tensor:
    """The chain on PyTorch's own operators; ``sources`` are those of all layers in a row."""
    values = [x]
    for i, epsilon in enumerate(eps):
        source, residual, relu, _, _, _, *sizes = layers[i * ops.LAYER_FIELDS : (i + 1) * ops.LAYER_FIELDS]
        weight, bias, gamma, beta, mean, var = sources[i * 6 : (i + 1) * 6]
        inputs = [values[source]] if residual < 0 else [values[source], values[residual]]
        name = "conv_bn_relu" if relu else "conv_bn"
        values.append(
            ops.unfused_conv(
                name, inputs, weight, bias, (gamma, beta, mean, var, epsilon), sizes[:2], sizes[2:], [1, 1], groups=1
            )
        )
    return values[-1]


class Fusing:
    """Runs what :meth:`flow` states as one operator."""

    _chain: Chain | None = None
    _program: Program | None = None
    _whole: Any = None  # of networks: see whole.py
    training: bool

    def flow(self, build: Build, x: Any) -> Any:
        """The dataflow from ``x`` to the result, by calls of ``build`` alone."""
        raise NotImplementedError(f"{type(self).__name__}.flow")

    def parts(self) -> list[nn.Module]:
        """The owner, and every module that :meth:`flow` stands for: a change in one of them ends the chain."""
        raise NotImplementedError(f"{type(self).__name__}.parts")

    def opened(self) -> list[nn.Module]:
        """Those of the parts whose attributes count, because :meth:`flow` was read from their code."""
        return []

    def label(self) -> str:
        """The name in ``backends.fallbacks``"""
        return type(self).__name__

    def fused(self, x: Tensor, pool: nn.Module | None = None) -> Tensor | None:
        """The result of the fused operator, or None where it cannot run, which ``backends.fallbacks`` then shows.

        pool: max pooling that takes the result, by the same operator where no gradient is wanted.
        """
        window = None if pool is None or self.training or backends.kind(x) != "cpu" else pooling_window(pool)
        if pool is not None and (window is None or torch.compiler.is_compiling()):
            y = self.fused(x)
            return None if y is None else pool(y)
        autocast = autocast_dtype(x)
        if self.training:
            return self._trained(x, autocast)
        if torch.compiler.is_compiling():
            return self._traced(x, autocast)
        chain, x, reason = self.packed(x, autocast)
        if chain is None:
            return self._declined(reason)
        if torch.is_grad_enabled() and (x.requires_grad or chain.requires_grad()):
            y = _Run.apply(chain, x, autocast, *(t for sources in chain.sources for t in sources))
            return y if pool is None else pool(y)
        return chain.run(x, window or ())

    def packed(self, x: Tensor, autocast: torch.dtype | None) -> tuple[Chain | None, Tensor, str | None]:
        """The chain as it is now and ``x`` in the dtype that it takes, or None, ``x`` and why not."""
        reason = self.cannot_run(x, False, autocast)
        if reason is not None:
            return None, x, reason
        chain = self._chain
        if chain is None or not chain.fresh():
            recorder = Recorder()
            self.flow(recorder, 0)
            reason = recorder.reason(self.parts()) or uncounted_reason(self.parts())
            chain = self._chain = Chain(self.parts(), recorder, self.opened()) if reason is None else None
        if chain is None:
            return None, x, reason
        x, reason = _admitted(x, chain.dtype, chain.device, autocast)
        return (chain if reason is None else None), x, reason

    def _declined(self, reason: str | None) -> Tensor | None:
        """No result, which is counted."""
        backends.decline(self.label(), reason or "")
        return None

    def cannot_run(self, x: Tensor, training: bool, autocast: torch.dtype | None) -> str | None:
        """Why a call cannot run fused, or None, as far as that does not depend on the weights."""
        device = backends.kind(x)
        reason = backends.unfused_reason(_operator(training), device)
        if reason is not None:
            return reason
        if device not in ops.DTYPES:
            return f"no kernel for {device} tensors"
        if x.dim() != 4:
            return f"an input of {x.dim()} dimensions"
        if x.dtype not in ops.DTYPES[device] or (autocast or x.dtype) not in ops.DTYPES[device]:
            return f"no kernel for {autocast or x.dtype}"
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

    def _trained(self, x: Tensor, autocast: torch.dtype | None) -> Tensor | None:
        """In training mode: one autograd function. What was recorded holds until a module changes, not a weight."""
        reason = self.cannot_run(x, True, autocast)
        if reason is not None:
            return self._declined(reason)
        program = None if torch.compiler.is_compiling() else self._program
        if program is None or not program.fresh():
            recorder = Recorder(training=True)
            self.flow(recorder, 0)
            program = Program(recorder.pairs, recorder.layers)
            reason = recorder.reason(self.parts()) or program.reason()
            if reason is not None:
                return self._declined(reason)
            if not torch.compiler.is_compiling():
                program.watch = Watch(self.parts(), self.opened(), contents=False)
                self._program = program
        weight = program.pairs[0][0].weight
        x, reason = _admitted(x, weight.dtype, weight.device, autocast)
        if x.numel() == 0:
            reason = reason or "an empty input"
        return self._declined(reason) if reason is not None else program.run(x)

    def _traced(self, x: Tensor, autocast: torch.dtype | None) -> Tensor | None:
        """For the compiler: filters are packed in the graph, where freezing can fold them, and never go stale."""
        recorder = Recorder()
        reason = self.cannot_run(x, False, autocast)
        if reason is None:
            self.flow(recorder, 0)
            reason = recorder.reason(self.parts())
        if reason is not None:
            return self._declined(reason)
        if torch.is_grad_enabled() or autocast is not None:
            return self.flow(Layers(), x)
        filters = [
            torch.ops.resnet_fast.pack_conv_bn(
                *_sources(conv, bn),
                _eps(bn),
                0 if backends.kind(x) == "cuda" else algorithm_of_filter(conv.weight, conv.stride),
            )
            for conv, bn in recorder.pairs
        ]
        return torch.ops.resnet_fast.residual_stage(x, filters, recorder.layers)


class Fused(Fusing, nn.Module):
    """Mixin: in eval mode, runs what :meth:`flow` states as one operator; otherwise, what the class behind it does."""

    flow_is_forward: ClassVar[bool] = False  # the class that defines forward also says what it does

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "flow" in vars(cls) or "forward" in vars(cls):
            cls.flow_is_forward = "flow" in vars(cls) and "forward" in vars(cls)

    def parts(self) -> list[nn.Module]:
        return list(self.modules())

    def train(self, mode: bool = True) -> Fused:
        if mode != self.training:
            self._chain = self._program = self._whole = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles pack for themselves: packed filters are as large as the weights and bound to this CPU."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_chain", "_program", "_whole")}

"""``resnet_fast.explain(model, x)``: kernel, FLOPs, bytes and measured time of each layer, against the CPU's peak."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..chain.cpu_algorithm import BF16_DIRECT, BF16_WINOGRAD, NAMES
from ..chain.executor import ChainExecutor, FusedModule, autocast_dtype
from ..chain.inference import Chain
from ..chain.pooling import pair, pooling_window
from ..chain.record import ChainRecorder
from ..fusion.convert import FusionState
from ..fusion.converted_module import ConvertedModule
from ..models import CifarResNet
from ..ops.spec import encode
from .machine import Peak, measure_peak
from .system import cpu_name

__all__ = ["Explanation", "Row", "Whole", "explain"]

# Modules that do nothing in eval mode.
_IDLE = (nn.Dropout, nn.Identity)


@dataclass(frozen=True)
class Row:
    """One layer.

    ``flops``: 2 per multiply-add of the direct convolution or linear layer, whatever the algorithm; 0 for others.
    ``bytes``: compulsory traffic, activations, residual and weights once each.
    """

    name: str
    kernel: str
    shape: tuple[int, ...]  # of the output
    flops: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Whole:
    """A fused module: the time of its layers one by one, and as the one operator that runs them."""

    name: str
    layers: int
    alone_seconds: float
    seconds: float


@dataclass(frozen=True)
class Explanation:
    """The result of :func:`explain`; prints as a table."""

    rows: list[Row]
    wholes: list[Whole]
    forward_seconds: float  # of model(x)
    peak: Peak
    fallbacks: dict[str, int]

    def __str__(self) -> str:
        total = Row(
            "sum of the layers",
            "",
            (),
            sum(r.flops for r in self.rows),
            sum(r.bytes for r in self.rows),
            sum(r.seconds for r in self.rows),
        )
        header = ["layer", "kernel", "output", "MFLOP", "MB", "ms", "share", "GFLOP/s", "% peak"]
        cells = [header, *(self._cells(r, total.seconds) for r in [*self.rows, total])]
        widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
        table = [
            "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in cells
        ]
        rule = "-" * len(table[0])
        lines = [table[0], rule, *table[1:-1], rule, table[-1], ""]
        for w in self.wholes:
            lines.append(
                f"{w.name or 'stem'}: {w.layers} layers, one by one {w.alone_seconds * 1e3:.2f} ms, as one operator "
                f"{w.seconds * 1e3:.2f} ms"
            )
        rate, traffic = total.flops / self.forward_seconds, total.bytes / self.forward_seconds
        lines += [
            f"model(x): {self.forward_seconds * 1e3:.2f} ms, {rate / 1e9:.1f} GFLOP/s = {rate / self.peak.flops:.0%} "
            f"of the measured peak, {traffic / 1e9:.1f} GB/s = {traffic / self.peak.bytes:.0%} of the measured "
            "bandwidth if every map went through memory",
            f"measured peak: {self.peak.flops / 1e9:.1f} GFLOP/s (best of several torch.mm, 2048 x 2048), "
            f"{self.peak.bytes / 1e9:.1f} GB/s (best of several copies of 256 MiB), {self.peak.threads} threads, "
            f"{cpu_name()}",
            "FLOPs are those of the convolution as defined: Winograd multiplies less and can pass 100%.",
        ]
        lines += [f"not fused: {what} ({count} calls)" for what, count in self.fallbacks.items()]
        return "\n".join(lines)

    def _cells(self, r: Row, total_seconds: float) -> list[str]:
        rate = r.flops / r.seconds if r.seconds else 0.0
        return [
            r.name,
            r.kernel,
            "x".join(map(str, r.shape)),
            f"{r.flops / 1e6:.1f}",
            f"{r.bytes / 1e6:.2f}",
            f"{r.seconds * 1e3:.3f}",
            f"{r.seconds / total_seconds:.1%}",
            f"{rate / 1e9:.1f}" if r.flops else "",
            f"{rate / self.peak.flops:.0%}" if r.flops else "",
        ]


@dataclass
class _Event:
    """A call within a forward: of a fused chain, or of a module that PyTorch runs."""

    module: Any  # nn.Module or ChainExecutor
    x: Tensor
    y: Tensor
    again: Callable[[], object]  # repeats the call
    pool: nn.Module | None = None  # max pooling in the same operator as a fused chain

    @property
    def fused(self) -> bool:
        return isinstance(self.module, ChainExecutor)


def _median_seconds(call: Callable[[], object], runs: int) -> float:
    call()
    begin = time.perf_counter()
    call()
    repeats = max(1, round(1e-3 / (time.perf_counter() - begin)))
    samples = []
    for _ in range(runs):
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        samples.append((time.perf_counter() - begin) / repeats)
    return sorted(samples)[len(samples) // 2]


@contextmanager
def _listening(model: nn.Module, leaves: list[nn.Module]) -> Iterator[list[_Event]]:
    """Context manager: lists the calls of fused chains and of ``leaves``. Fused modules get no hook, which would unfuse
    them."""
    events: list[_Event] = []

    def listen(module: ChainExecutor) -> Callable[..., Tensor | None]:
        run = type(module).fused

        def fused(x: Tensor, pool: nn.Module | None = None, **layout: bool) -> Tensor | None:
            before = len(events)
            y = run(module, x, pool, **layout)
            # Where the pooling runs apart, the inner call of fused has listed the chain already.
            if y is not None and len(events) == before:
                events.append(_Event(module, x, y, lambda: run(module, x, pool, **layout), pool))
            return y

        return fused

    def after(module: nn.Module, inputs: Any, named: Any, y: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(y, Tensor):
            events.append(_Event(module, inputs[0], y, lambda: module.forward(*inputs, **named)))

    wrapped = list(_chains(model))
    hooks = [leaf.register_forward_hook(after, with_kwargs=True) for leaf in leaves]
    networks = [m for m in model.modules() if isinstance(m, CifarResNet)]
    for network in networks:
        network.__dict__["small_batch"] = 0  # stage by stage, not as a whole
    for m in wrapped:
        m.__dict__["fused"] = listen(m)
    try:
        yield events
    finally:
        for m in wrapped:
            del m.__dict__["fused"]
        for network in networks:
            del network.__dict__["small_batch"]
        for hook in hooks:
            hook.remove()


def _chains(model: nn.Module) -> dict[ChainExecutor, str]:
    """All fused chains, of this package's modules or found by ``fuse``, and their names."""
    chains: dict[ChainExecutor, str] = {}
    for name, m in model.named_modules():
        if isinstance(m, FusedModule):
            chains[m] = name
        elif isinstance(m, ConvertedModule) and (state := FusionState.of(m)) is not None:
            chains.update((segment, name) for plan in state.each_plan() for segment in plan.segments)
    return chains


def explain(model: nn.Module, x: Tensor, *, runs: int = 7) -> Explanation:
    """Measures ``model(x)``, and each of its layers alone on the input that it gets there.

    Layers of fused modules run as chains of one layer, without a residual that has another shape than the layer's
    input. Unfused modules are called ``eager``; operators that are not modules (an addition, a softmax) have no row. A
    layer measured alone finds its activations in cache, which a fused module achieves in the network, too: ``.wholes``
    compares.

    Args:
        model: a network in eval mode, fused or not.
        x: its input, on the CPU.
        runs: samples of each time; the median is reported.

    Returns:
        An object that prints as a table; ``.rows`` has one :class:`Row` a layer.

    Raises:
        ValueError: ``model`` is in training mode, ``x`` is empty or not on the CPU, or ``runs`` is less than 1.
    """
    if model.training:
        raise ValueError("model is in training mode, want model.eval()")
    if x.device.type != "cpu":
        raise ValueError(f"x is on {x.device}, want the CPU")
    if x.numel() == 0:
        raise ValueError(f"x has shape {list(x.shape)}, want at least 1 of each: nothing can be measured on nothing")
    if runs < 1:
        raise ValueError(f"runs is {runs}, want at least 1")
    names: dict[Any, str] = {module: name for name, module in model.named_modules()}
    names.update(_chains(model))
    before = backends.fallbacks()
    with torch.no_grad():
        with _listening(model, []) as events:
            model(x)
        after = backends.fallbacks()
        inside = {part for event in events for part in (*event.module.parts(), event.pool)}
        leaves = [m for m in model.modules() if not list(m.children()) and m not in inside and not isinstance(m, _IDLE)]
        with _listening(model, leaves) as events:
            model(x)
        forward_seconds = _median_seconds(lambda: model(x), runs)
        rows: list[Row] = []
        wholes = []
        for event in events:
            seconds = _median_seconds(event.again, runs)
            if not event.fused:
                rows.append(_eager_row(names[event.module], event, seconds))
                continue
            layers = _chain_rows(event, names, runs)
            alone = sum(layer.seconds for layer in layers)
            wholes.append(Whole(names[event.module], len(layers), alone, seconds))
            rows += layers
    bf16 = torch.bfloat16 in (x.dtype, autocast_dtype(x)) and backends.bf16_products()
    exact = x.dtype == torch.float64
    peak = measure_peak(torch.bfloat16 if bf16 else torch.float64 if exact else torch.float32)
    new = {what: count - before.get(what, 0) for what, count in after.items() if count > before.get(what, 0)}
    return Explanation(rows, wholes, forward_seconds, peak, new)


def _chain_rows(event: _Event, names: dict[Any, str], runs: int) -> list[Row]:
    chain: Chain = event.module._chain
    recorder = ChainRecorder()  # for the modules of the chain
    event.module.emit(recorder, 0)
    run = torch.ops.resnet_fast.residual_stage
    autocast = autocast_dtype(event.x)
    exact = torch.float64 in (event.x.dtype, chain.dtype)
    x = event.x.to(chain.dtype if autocast is None or exact else autocast)
    filters, algorithms = chain.filters(x), chain.algorithms(x)
    values = [x]
    rows = []
    for i, (conv, _) in enumerate(recorder.pairs):
        spec = chain.specs[i]
        added = spec.residual
        image, weight = values[spec.source], conv.weight
        # A chain of one layer has one input, which stands in for a residual of its shape.
        alone = spec._replace(source=0, residual=0 if added >= 0 and values[added].shape == image.shape else -1)
        pool = event.pool if i + 1 == len(recorder.pairs) else None
        call = partial(run, image, [filters[i]], encode([alone]), [] if pool is None else pooling_window(pool))
        y = call()
        values.append(y)

        isa = "avx512_bf16" if algorithms[i] in (BF16_DIRECT, BF16_WINOGRAD) else backends.isa()
        kernel = f"{NAMES[algorithms[i]]} {_geometry(conv)} {isa}"
        if pool is not None:
            kernel += f", max pool {_geometry(pool)}"
        numel = image.numel() + weight.numel() + y.numel() * (2 if added >= 0 else 1)
        height, width = spec.size(*image.shape[2:])
        flops = 2 * image.shape[0] * height * width * weight.numel()
        seconds = _median_seconds(call, runs)
        rows.append(Row(names[conv], kernel, tuple(y.shape), flops, numel * y.element_size(), seconds))
    return rows


def _geometry(module: Any) -> str:
    """Filter or window, and stride, as ``3x3/2``."""
    (height, width), (down, right) = pair(module.kernel_size), pair(module.stride)
    return f"{height}x{width}/{down if down == right else (down, right)}"


def _eager_row(name: str, event: _Event, seconds: float) -> Row:
    module, y = event.module, event.y
    parameters = sum(p.numel() for p in module.parameters(recurse=False))
    kind = type(module).__name__
    flops = 0
    if isinstance(module, nn.Conv2d):
        kind += f" {_geometry(module)}"
        flops = 2 * y.numel() * module.weight[0].numel()
    elif isinstance(module, nn.Linear):
        flops = 2 * y.numel() * module.in_features
    size = (event.x.numel() + y.numel() + parameters) * y.element_size()
    return Row(name, f"eager {kind}", tuple(y.shape), flops, size, seconds)

"""A roofline of a network on a GPU: FLOPs, bytes and the least time by the datasheet, counted without running anything.

For each convolution with its epilogue:

- compulsory bytes: input, filters, residual and output, each once. A fused kernel moves these; split-K partial sums
  stay in the second-level cache.
- eager bytes: the convolution writes its output, batch norm reads and writes it, the residual add reads two tensors and
  writes one, ReLU reads and writes one.
- floor: the larger of FLOPs over peak arithmetic and compulsory bytes over peak bandwidth (Williams, Waterman,
  Patterson 2009, "Roofline: an insightful visual performance model for multicore architectures").
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..chain.executor import FusedModule
from ..chain.record import ChainRecorder

__all__ = ["A100", "H100", "Datasheet", "Roofline", "RooflineRow", "roofline"]


@dataclass(frozen=True)
class Datasheet:
    """Peak rates by the vendor's datasheet: dense FLOP/s by dtype, bytes/s of memory."""

    name: str
    flops: dict[torch.dtype, float]
    bytes: float

    def floor(self, flops: int, moved: int, dtype: torch.dtype) -> float:
        """Lower bound of a kernel's time in seconds."""
        return max(flops / self.flops[dtype], moved / self.bytes)


def _rates(half: float, tf32: float) -> dict[torch.dtype, float]:
    """Rates by dtype; float32 stands for TF32, PyTorch's default for convolutions."""
    return {torch.float16: half, torch.bfloat16: half, torch.float32: tf32}


A100 = Datasheet("A100 SXM 80 GB", _rates(312e12, 156e12), 2.039e12)
H100 = Datasheet("H100 SXM", _rates(989.4e12, 494.7e12), 3.35e12)


@dataclass(frozen=True)
class RooflineRow:
    """One convolution with its epilogue; ``flops``: 2 per multiply-add."""

    name: str
    kernel: str
    shape: tuple[int, ...]  # of the output
    flops: int
    bytes: int
    eager_bytes: int

    @property
    def intensity(self) -> float:
        """FLOPs per compulsory byte."""
        return self.flops / self.bytes


@dataclass(frozen=True)
class Roofline:
    """The result of :func:`roofline`; prints as a table."""

    rows: list[RooflineRow]
    dtype: torch.dtype
    gpus: tuple[Datasheet, ...] = (A100, H100)

    @property
    def total(self) -> RooflineRow:
        sums = (sum(getattr(r, field) for r in self.rows) for field in ("flops", "bytes", "eager_bytes"))
        return RooflineRow("sum of the convolutions", "", (), *sums)

    def floor(self, gpu: Datasheet) -> float:
        """Lower bound of the time of all layers, one after another, in seconds."""
        return sum(gpu.floor(r.flops, r.bytes, self.dtype) for r in self.rows)

    def __str__(self) -> str:
        header = ["layer", "fused", "output", "MFLOP", "MB", "eager MB", "FLOP/B"]
        header += [f"{gpu.name.split()[0]} us" for gpu in self.gpus]
        cells = [header]
        for r in [*self.rows, self.total]:
            floors = [
                self.floor(gpu) if r.name == self.total.name else gpu.floor(r.flops, r.bytes, self.dtype)
                for gpu in self.gpus
            ]
            cells.append(
                [
                    *(r.name, r.kernel, "x".join(map(str, r.shape)), f"{r.flops / 1e6:.1f}", f"{r.bytes / 1e6:.2f}"),
                    *(f"{r.eager_bytes / 1e6:.2f}", f"{r.intensity:.0f}", *(f"{s * 1e6:.2f}" for s in floors)),
                ]
            )
        widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
        table = [
            "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in cells
        ]
        rule = "-" * len(table[0])
        names = ", ".join(
            f"{g.name} ({g.flops[self.dtype] / 1e12:g} TFLOP/s, {g.bytes / 1e12:g} TB/s)" for g in self.gpus
        )
        notes = (
            "MB: every tensor once, which is what a fused kernel moves; eager MB: what separate kernels move.",
            f"Computed from datasheets, not measured: {names}.",
        )
        return "\n".join([table[0], rule, *table[1:-1], rule, table[-1], "", *notes])


def roofline(model: nn.Module, x: Tensor) -> Roofline:
    """The roofline of the convolutions of ``model(x)``, with the epilogues that the model's blocks state in ``emit``.

    Args:
        model: a network in eval mode; a copy of it runs on the meta device, which computes nothing.
        x: its input, of which shape and dtype count: float16, bfloat16, or float32, which stands for TF32.

    Raises:
        ValueError: ``model`` is in training mode, ``x`` is empty, or the datasheets have no rate for its dtype.
    """
    if model.training:
        raise ValueError("model is in training mode, want model.eval()")
    if x.dtype not in A100.flops:
        raise ValueError(f"x has dtype {x.dtype}, want float16, bfloat16 or float32")
    if x.numel() == 0:
        raise ValueError(f"x has shape {list(x.shape)}, want at least 1 of each")
    epilogues = _epilogues(model)
    shadow = copy.deepcopy(model).to(device="meta", dtype=x.dtype)
    names = {module: name for name, module in shadow.named_modules()}
    rows: list[RooflineRow] = []

    def count(conv: Any, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        name = names[conv]
        bn, relu, residual = epilogues.get(name, (False, False, False))
        size, out = y.element_size(), y.numel()
        once = inputs[0].numel() + conv.weight.numel() + out
        fused = "conv" + "+bn" * bn + "+add" * residual + "+relu" * relu
        # Passes over the output besides the convolution's own write.
        passes = 2 * bn + 3 * residual + 2 * relu
        rows.append(
            RooflineRow(
                name,
                f"{conv.kernel_size[0]}x{conv.kernel_size[1]}/{conv.stride[0]} {fused}",
                tuple(y.shape),
                2 * out * conv.weight[0].numel(),
                (once + residual * out) * size,
                (once + passes * out) * size,
            )
        )

    for module in names:
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        shadow(torch.empty(x.shape, dtype=x.dtype, device="meta"))
    return Roofline(rows, x.dtype)


def _epilogues(model: nn.Module) -> dict[str, tuple[bool, bool, bool]]:
    """By name of a convolution in a fused module: whether batch norm, ReLU and a residual are its epilogue."""
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for module in model.modules():
        if not isinstance(module, FusedModule) or (
            not module.emit_is_forward and type(module).emit is FusedModule.emit
        ):
            continue
        recorder = ChainRecorder()
        module.emit(recorder, 0)
        for (conv, bn), spec in zip(recorder.pairs, recorder.specs, strict=True):
            found[names[conv]] = (bn is not None, spec.relu, spec.residual >= 0)
    return found

"""Training steps: forward, backward and step of SGD, timed in turn; what they keep and need at most in memory.

Nothing is timed before its gradients are right: those of all parameters together, each in units of its norm, are at
most three times as far from float64 as eager PyTorch's in the worse of its layouts (the rule for Winograd), in the same
dtype.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from resnet_fast import backends, reference

from .images import images
from .memory import peak_bytes, saved_bytes
from .timing import Spread, Timing
from .verify import WrongResultError, rms

__all__ = ["CASES", "PHASES", "VARIANTS", "Result", "TrainingCase", "readme_table", "results", "table"]

PHASES = ("forward", "backward", "step")
BASELINE = "eager channels_last"
FACTOR = 3.0


@dataclass(frozen=True)
class TrainingCase:
    """A network in training mode, and the shape of a batch."""

    model: str
    shape: tuple[int, int, int, int]
    full: bool = False  # measured with --full only

    @property
    def group(self) -> str:
        return f"{self.model}, {'x'.join(map(str, self.shape))}, training"

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return getattr(reference, self.model)().train()

    def batch(self, kind: str) -> tuple[Tensor, Tensor]:
        x = images(kind, self.shape[0], self.shape[2])
        return x, torch.arange(len(x)) % 2


CASES = [
    TrainingCase("ResNet32", (8, 3, 224, 224)),
    TrainingCase("cifar_resnet32", (128, 3, 32, 32)),
    TrainingCase("resnet50", (4, 3, 160, 160), full=True),
]


@dataclass(frozen=True)
class TrainingVariant:
    layout: torch.memory_format
    fused: bool = False
    compiled: bool = False
    dtype: torch.dtype = torch.float32  # of autocast
    recompute: bool = False


VARIANTS = {
    "eager": TrainingVariant(torch.contiguous_format),
    "eager channels_last": TrainingVariant(torch.channels_last),
    "torch.compile": TrainingVariant(torch.contiguous_format, compiled=True),
    "torch.compile channels_last": TrainingVariant(torch.channels_last, compiled=True),
    "resnet_fast": TrainingVariant(torch.channels_last, fused=True),
    "resnet_fast, outputs recomputed": TrainingVariant(torch.channels_last, fused=True, recompute=True),
    "eager bf16": TrainingVariant(torch.contiguous_format, dtype=torch.bfloat16),
    "eager channels_last bf16": TrainingVariant(torch.channels_last, dtype=torch.bfloat16),
    "resnet_fast bf16": TrainingVariant(torch.channels_last, fused=True, dtype=torch.bfloat16),
}


@dataclass(frozen=True)
class Result:
    """One line of the report. ``ratios``: time over that of eager channels_last in the same rounds, by phase."""

    group: str
    variant: str
    images: str
    threads: int
    rounds: int
    seconds: dict[str, Spread]
    ratios: dict[str, Spread]
    saved: int  # bytes between forward and backward
    peak: int  # bytes, the most during a step
    error: float  # of the gradients against float64, as a multiple of eager's


class Trainer:
    """A network prepared for one variant on ``device``, its optimizer and its batch."""

    def __init__(
        self, case: TrainingCase, plain: nn.Module, variant: TrainingVariant, kind: str, device: str = "cpu"
    ) -> None:
        self.variant, self.device = variant, device
        model = copy.deepcopy(plain)
        if variant.fused:
            model = getattr(resnet_fast, case.model)().train()
            model.load_state_dict(plain.state_dict())
        self.model = model.to(device, memory_format=variant.layout)  # type: ignore[call-overload]
        x, target = case.batch(kind)
        self.x, self.target = x.to(device).contiguous(memory_format=variant.layout), target.to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        run: Callable[[Tensor], Tensor] = getattr(self.model, "logits", self.model)
        if variant.compiled:
            torch.compiler.reset()
            run = torch.compile(run)
        self._run = run

    @contextmanager
    def settings(self) -> Iterator[None]:
        before = backends.training.recompute_outputs
        backends.training.recompute_outputs = self.variant.recompute
        try:
            # Raises where something would run unfused; on GPUs all kernels take part, and fallbacks() tells.
            with backends.use("cpu" if self.variant.fused and backends.kind(self.x) == "cpu" else "auto"):
                yield
        finally:
            backends.training.recompute_outputs = before

    def loss(self) -> Tensor:
        dtype = self.variant.dtype
        with torch.autocast(self.device, dtype, enabled=dtype != torch.float32):
            scores = self._run(self.x)
        return F.cross_entropy(scores.float(), self.target)

    def gradients(self) -> list[Tensor]:
        self.optimizer.zero_grad()
        with self.settings():
            self.loss().backward()
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def step(self) -> dict[str, float]:
        """A step of SGD; the seconds of its phases, on GPUs those of the host alone."""
        self.optimizer.zero_grad()
        with self.settings():
            begin = time.perf_counter()
            loss = self.loss()
            middle = time.perf_counter()
            loss.backward()
            end = time.perf_counter()
            self.optimizer.step()
            return dict(zip(PHASES, (middle - begin, end - middle, time.perf_counter() - begin), strict=True))

    def saved(self) -> int:
        with self.settings():
            return saved_bytes(self.model, self.loss)


class Gradients:
    """The exact gradients, and how far eager PyTorch's are from them in one dtype."""

    def __init__(self, case: TrainingCase, plain: nn.Module, kind: str, device: str = "cpu") -> None:
        exact = copy.deepcopy(plain).to(device, torch.float64)
        x, target = case.batch(kind)
        F.cross_entropy(getattr(exact, "logits", exact)(x.to(device).double()), target.to(device)).backward()
        self.exact = [p.grad for p in exact.parameters() if p.grad is not None]
        self._eager: dict[torch.dtype, float] = {}
        self._make = lambda variant: Trainer(case, plain, variant, kind, device)

    def error(self, found: list[Tensor]) -> float:
        # A bias before batch norm has no gradient but rounding.
        pairs = [(f, e) for f, e in zip(found, self.exact, strict=True) if e.norm() > 1e-9]
        return rms(torch.cat([((f - e) / e.norm()).flatten() for f, e in pairs]))

    def check(self, name: str, trainer: Trainer) -> float:
        dtype = trainer.variant.dtype
        if dtype not in self._eager:
            layouts = (torch.contiguous_format, torch.channels_last)
            runs = [self._make(TrainingVariant(layout, dtype=dtype)).gradients() for layout in layouts]
            self._eager[dtype] = max(map(self.error, runs))
        error = self.error(trainer.gradients())
        if not error <= FACTOR * self._eager[dtype]:
            raise WrongResultError(f"{name}: gradients are {error:.3g} from float64, eager {self._eager[dtype]:.3g}")
        return error / self._eager[dtype]


def results(
    case: TrainingCase, variants: Iterable[str], kind: str, rounds: int = 15, seconds: float = 60.0
) -> tuple[list[Result], dict[str, WrongResultError]]:
    """All variants of a case in one interleaved run, and which have no time because they are wrong."""
    plain = case.build()
    exact = Gradients(case, plain, kind)
    trainers: dict[str, Trainer] = {}
    errors: dict[str, float] = {}
    refused: dict[str, WrongResultError] = {}
    for name in dict.fromkeys([BASELINE, *variants]):
        trainer = Trainer(case, plain, VARIANTS[name], kind)
        try:
            errors[name] = exact.check(name, trainer)
            trainers[name] = trainer
        except WrongResultError as reason:
            refused[name] = reason
    once = {name: max(trainer.step()["step"], 1e-4) for name, trainer in trainers.items()}
    rounds = min(rounds, max(5, int(seconds / sum(once.values()))))
    samples: dict[str, dict[str, list[float]]] = {phase: {name: [] for name in trainers} for phase in PHASES}
    for _ in range(rounds):
        for name, trainer in trainers.items():
            for phase, taken in trainer.step().items():
                samples[phase][name].append(taken)
    timings = {phase: Timing(samples[phase]) for phase in PHASES}
    found = []
    for name, trainer in trainers.items():
        found.append(
            Result(
                group=case.group,
                variant=name,
                images=kind,
                threads=torch.get_num_threads(),
                rounds=rounds,
                seconds={phase: timings[phase].seconds(name) for phase in PHASES},
                ratios={phase: timings[phase].ratio(name, BASELINE) for phase in PHASES},
                saved=trainer.saved(),
                peak=peak_bytes(trainer.step),
                error=errors[name],
            )
        )
    return found, refused


def _spread(s: Spread) -> str:
    return f"{s.median:.3f} ({s.low:.3f}-{s.high:.3f})"


def table(rows: list[Result]) -> str:
    """Markdown: every variant with its phases and its memory."""
    header = ["case", "variant", *(f"{phase}, ms" for phase in PHASES), *(f"{p} / {BASELINE}" for p in PHASES)]
    lines = [[*header, "kept, MB", "peak, MB", "error / eager's"]]
    for r in rows:
        milliseconds = [f"{r.seconds[phase].median * 1e3:.1f}" for phase in PHASES]
        ratios = [_spread(r.ratios[phase]) for phase in PHASES]
        memory = [f"{r.saved / 1e6:.1f}", f"{r.peak / 1e6:.1f}"]
        lines.append([f"{r.group}, {r.images}", r.variant, *milliseconds, *ratios, *memory, f"{r.error:.2f}"])
    return _markdown(lines)


def readme_table(rows: list[Result]) -> str:
    """The table of docs/measurements/cpu-training.md: a line a network, time of a step and bytes kept over those of
    eager channels_last."""
    lines = [
        ["network", "eager, ms", "torch.compile", "resnet_fast", "kept for the backward pass", "recomputing outputs"]
    ]
    for group in dict.fromkeys(r.group for r in rows):
        of = {r.variant: r for r in rows if r.group == group}
        base = of[BASELINE]
        compiled = [of[n].ratios["step"] for n in ("torch.compile", "torch.compile channels_last") if n in of]
        ours, less = of.get("resnet_fast"), of.get("resnet_fast, outputs recomputed")
        name, shape, _ = group.split(", ")
        batch, _, height, width = shape.split("x")
        lines.append(
            [
                f"{name}, batch {batch}, {height} x {width}",
                f"{base.seconds['step'].median * 1e3:.0f}",
                _spread(min(compiled, key=lambda s: s.median)) if compiled else "",
                f"**{ours.ratios['step'].median:.3f}**{_spread(ours.ratios['step'])[5:]}" if ours else "",
                f"{ours.saved / base.saved:.3f}" if ours else "",
                f"{less.saved / base.saved:.3f}" if less else "",
            ]
        )
    return _markdown(lines)


def _markdown(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *rows[1:]])

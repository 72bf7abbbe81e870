"""Thousands of training steps without a synchronisation, under conditions that show what a single step hides.

cifar_resnet32 learns in bfloat16 under autocast and in float32 in turn, with another batch size at each step, beside an
eager network that ``torch.compile`` runs on the same GPU, while blocks of memory of many sizes are taken, filled with
NaN and given back: a kernel that reads what nobody wrote, or writes where it should not, turns a loss into NaN or ends
in an error of CUDA. At the end the host waits, and every loss must be finite.
"""

from __future__ import annotations

import copy
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fast
from resnet_fast import backends, launch, reference

from ..options import Options
from ..worker import Emit

__all__ = ["Pressure", "items", "run"]

BATCHES = (128, 37, 64, 1 + 16, 96, 8)
SMALL_BATCHES = (4, 3)
MOST_BYTES = 256 * 2**20
REPORT = 100  # steps between two rows


class Pressure:
    """Takes and gives back memory of random sizes; what is taken is filled with NaN."""

    def __init__(self, device: str, most_bytes: int = MOST_BYTES, held: int = 24) -> None:
        self.device, self.most, self.count = device, most_bytes, held
        self.random = random.Random(0)
        self.held: list[Tensor] = []

    def step(self) -> None:
        for _ in range(self.random.randrange(1, 4)):
            # As many small ones as large ones: sizes are even on a scale of logarithms.
            size = int(1024 * (self.most / 1024) ** self.random.random())
            self.held.append(torch.full((size // 4,), torch.nan, device=self.device))
        while len(self.held) > self.random.randrange(1, self.count):
            self.held.pop(self.random.randrange(len(self.held)))


class Learner:
    """A network, its optimizer, and the losses of its steps, on the device until they are asked for."""

    def __init__(self, model: nn.Module, device: str, dtype: torch.dtype, compiled: bool = False) -> None:
        self.model = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.run: Any = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.device, self.dtype = device, dtype
        self.losses: list[Tensor] = []

    def step(self, x: Tensor, target: Tensor) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            scores = self.run(x)
        loss = F.cross_entropy(scores.float(), target)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach())

    def broken(self) -> int:
        """Losses that are not finite. Waits for the device."""
        return int((~torch.stack(self.losses).isfinite()).sum()) if self.losses else 0


def _compile(learners: list[Learner], images: Tensor, target: Tensor, batches: tuple[int, ...]) -> None:
    """All kernels at once, by steps that launch none of ours: their networks are copies."""
    import triton

    with (
        ThreadPoolExecutor() as pool,
        triton.AsyncCompileMode(pool),
        launch.compile_only(),
        torch.autograd.set_multithreading_enabled(False),  # backward in this thread, too
    ):
        for learner in learners:
            copied = Learner(copy.deepcopy(learner.model), learner.device, learner.dtype)
            for batch in batches:
                copied.step(images[:batch], target[:batch])
    torch.cuda.synchronize()


def items(options: Options) -> list[str]:
    return ["training steps"]


def run(item: str, options: Options, emit: Emit, deadline: float) -> None:
    device, small = options.device, options.simulated
    # Our own kernels are to hold, all of them: where times choose, a library's may stand in.
    os.environ["RESNET_FAST_TUNE"] = "0"
    torch.manual_seed(0)
    ours = [
        Learner(resnet_fast.CifarResNet(1) if small else resnet_fast.cifar_resnet32(), device, dtype)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    beside = Learner(reference.CifarResNet(1 if small else 5), device, torch.bfloat16, compiled=not small)
    size, batches = (12, SMALL_BATCHES) if small else (32, BATCHES)
    images = torch.randn(max(batches), 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    target = torch.arange(len(images), device=device) % 10
    pressure = Pressure(device, 2**20 if small else MOST_BYTES)
    backends.fallbacks(clear=True)
    # The compilers take their time before the steps begin.
    beside.step(images, target)
    if device == "cuda":
        _compile(ours, images, target, batches)
    begin, steps = time.monotonic(), 0
    reserve = 5.0
    while steps < options.steps and time.time() < deadline - reserve:
        batch = batches[steps % len(batches)]
        ours[steps // len(batches) % 2].step(images[:batch], target[:batch])
        beside.step(images, target)
        pressure.step()
        steps += 1
        if steps % REPORT == 0:
            emit({"steps so far": steps, "seconds": time.monotonic() - begin})
    if device == "cuda":
        torch.cuda.synchronize()
    broken = sum(learner.broken() for learner in (*ours, beside))
    emit(
        {
            "steps": steps,
            "wanted": options.steps,
            "losses that are not finite": broken,
            "first loss": float(ours[0].losses[0]) if ours[0].losses else None,
            "last loss": float(ours[0].losses[-1]) if ours[0].losses else None,
            "seconds": time.monotonic() - begin,
        }
    )
    if broken:
        raise RuntimeError(f"{broken} losses of {3 * steps} are not finite")
    if found := backends.fallbacks(clear=True):
        raise RuntimeError(f"resnet_fast ran in part unfused: {found}")
    if steps < options.steps:
        raise TimeoutError(f"{steps} steps of {options.steps} fitted into the time")

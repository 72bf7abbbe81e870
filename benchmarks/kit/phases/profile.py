"""Kernels by time and launches, ours and the strongest peer's; counters of a kernel by ncu where asked for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..kernels import kernels
from ..options import ROOT, Options
from ..tools import tool
from ..worker import Emit
from ..workloads import Workload
from . import infer, train

__all__ = ["call_of", "items", "run"]

DEFAULT = ("ResNet32 64", "resnet50 8", "cifar_resnet32 128", "cifar_resnet32 128 training")
SMALL = ("cifar_resnet20 2 8", "cifar_resnet20 2 8 training")
MOST = 25  # kernels of a table


def items(options: Options) -> list[str]:
    cases = list(options.cases or (SMALL if options.simulated else DEFAULT))
    return [*cases, *([f"ncu {cases[0]}"] if options.ncu else [])]


def call_of(workload: Workload, name: str, options: Options) -> Callable[[], object]:
    """A plain call, verified, whose kernels have names."""
    failed: list[Exception] = []
    ready: dict[str, Any]
    if workload.training:
        made, _ = train.verified(workload, [name], options.device, lambda _, error: failed.append(error))
        ready = {name: trainer.step for name, trainer in made.items()}
    else:
        ready, _ = infer.verified(workload, [name], infer.clock_of(options), lambda _, error: failed.append(error))
    if failed:
        raise failed[0]
    return ready[name]


def peer_of(workload: Workload, options: Options) -> str:
    """The fastest peer that this run has timed and that launches kernels one by one; or the usual one."""
    usual = "torch.compile" if workload.training else "cuDNN fused"
    file = Path(options.work, "train.jsonl" if workload.training else "infer.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    peers = ("eager", "torch.compile") if workload.training else (*infer.PLAIN[:-1], infer.COMPILED)
    times = {r["variant"]: r["ms"] for r in rows if r.get("case") == workload.name and r.get("variant") in peers}
    return min(times, key=lambda name: times[name], default="eager" if options.simulated else usual)


def run(item: str, options: Options, emit: Emit, deadline: float) -> None:
    if item.startswith("ncu "):
        _counters(item.removeprefix("ncu "), options, emit, deadline)
        return
    workload = Workload.of(item)
    ours = train.OURS if workload.training else infer.OUR_CALL
    peer = peer_of(workload, options)
    if options.simulated and not workload.training:
        peer = "cuDNN fused"
    for name in (ours, peer):
        with torch.set_grad_enabled(workload.training):
            found = kernels(call_of(workload, name, options), 5, options.device)
        total = sum(k.microseconds for k in found)
        emit(
            {
                "case": item,
                "variant": name,
                "kernels us": total,
                "launches": sum(k.launches for k in found),
                "kernels": [[k.name, k.microseconds, k.launches] for k in found[:MOST]],
            }
        )


def _counters(case: str, options: Options, emit: Emit, deadline: float) -> None:
    ncu = tool("ncu")
    if ncu is None:
        emit({"missing": "ncu is not installed here (PATH, /usr/local/cuda/bin, /opt/nvidia): no counters"})
        return
    command = [ncu, "--clock-control", "none", "--set", "full", "--kernel-name", f"regex:{options.ncu}"]
    command += ["--launch-skip", "3", "--launch-count", "3", sys.executable, "-m", "benchmarks.kit.phases.profile"]
    command += [str(options.file), case]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=options.environment(),
        timeout=max(10, deadline - time.time()),
    )
    report = Path(options.work, "logs", "ncu.out")
    report.write_text(done.stdout + done.stderr)
    shutil.copy(report, Path(options.out, "ncu.txt"))
    if "Section" not in done.stdout:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        raise RuntimeError(f"ncu saw no kernel whose name has {options.ncu!r}: {lines[-1]}")
    emit({"case": case, "ncu": options.ncu, "file": "ncu.txt"})


if __name__ == "__main__":
    _options = Options.load(sys.argv[1])
    _workload = Workload.of(sys.argv[2])
    with torch.set_grad_enabled(_workload.training):
        _call = call_of(_workload, train.OURS if _workload.training else infer.OUR_CALL, _options)
        for _ in range(5):
            _call()
    torch.cuda.synchronize()

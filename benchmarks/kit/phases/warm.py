"""Kernels are compiled by many processes at once, then chosen by one that has the GPU for itself.

What ``python -m resnet_fast tune`` measures beside other processes is thrown away: only what was compiled stays. The
choices come after that, one network after another; they lie in the folder of ``RESNET_FAST_CACHE``. Inductor's and
Triton's caches are filled on the way.
"""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
import time
from pathlib import Path

import torch

from .. import pool
from ..options import Options
from ..worker import Emit
from ..workloads import Workload
from . import infer, train

__all__ = ["items", "run", "tune_arguments"]

PARALLEL, CHOICES = "compiled in parallel", "choices"
_NO_COMMAND = 2  # argparse's exit status for a command that it does not know


def items(options: Options) -> list[str]:
    return [PARALLEL, CHOICES]


def cases(options: Options) -> list[str]:
    return [*infer.items(options), *train.items(options)]


def tune_arguments(workload: Workload, dtype: str) -> list[str]:
    sizes = ["--batch", str(workload.batch), "--image-size", str(workload.size)]
    return ["tune", workload.model, *sizes, "--dtype", dtype]


def choose(case: str, options: Options) -> str:
    """Runs ``tune``; where there is no such command, and for training, the network itself, once. Says which."""
    workload = Workload.of(case)
    if not workload.training and not options.simulated:
        before, sys.argv = sys.argv, ["resnet_fast", *tune_arguments(workload, options.dtype)]
        try:
            runpy.run_module("resnet_fast", run_name="__main__", alter_sys=False)
            return "tune"
        except SystemExit as status:
            if status.code in (None, 0):
                return "tune"
            if status.code != _NO_COMMAND:
                raise RuntimeError(f"tune ended with {status.code}") from None
        finally:
            sys.argv = before
    if workload.training:
        train.trainer(workload, train.OURS, options.device).step()
        return "a step"
    clock = infer.clock_of(options)
    x = workload.case().input("random").to(options.device, clock.dtype)
    with torch.no_grad():
        workload.module().fast().to(options.device, clock.dtype)(x.contiguous(memory_format=torch.channels_last))
    return "a call"


def compile_peer(case: str, options: Options) -> None:
    workload = Workload.of(case)
    if workload.training:
        train.trainer(workload, "torch.compile", options.device).step()
        return
    from ...gpu.variants import reduce_overhead

    x = workload.case().input("random").to(options.device, infer.clock_of(options).dtype)
    with torch.no_grad():
        reduce_overhead(workload.module().to(options.device), x.contiguous(memory_format=torch.channels_last))


def run(item: str, options: Options, emit: Emit, deadline: float) -> None:
    if item == PARALLEL:
        # A third of the time is for the choices.
        _parallel(options, emit, time.time() + 0.65 * (deadline - time.time()))
        return
    for case in cases(options):
        begin = time.monotonic()
        if time.time() > deadline:
            raise TimeoutError(f"{case} and what follows were not chosen: they will be at their first call")
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            how = choose(case, options)
        print(f"{case}\n{output.getvalue()}")
        emit({"case": case, "chosen by": how, "seconds": time.monotonic() - begin})


def _parallel(options: Options, emit: Emit, deadline: float) -> None:
    me = [sys.executable, "-m", "benchmarks.kit.phases.warm", str(options.file)]
    what = ["ours", "torch.compile"] if options.compiled and not options.simulated else ["ours"]
    commands = {f"{case}: {name}": [*me, name, case] for name in what for case in cases(options)}
    rehearsed = {"RESNET_FAST_CACHE": str(Path(options.work, "rehearsed")), "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    late = []
    for ended in pool.run(commands, options, options.jobs, deadline, rehearsed):
        if ended.code is None:
            late.append(ended.name)
        elif ended.code:
            emit({"command": ended.name, "error": ended.last_line})
        else:
            emit({"command": ended.name, "seconds": ended.seconds})
    if late:
        raise TimeoutError(f"not compiled in time: {', '.join(late)}")


def _main(path: str, what: str, case: str) -> None:
    options = Options.load(path)
    if options.simulated:
        from ..rehearsal import rehearsal

        with rehearsal():
            choose(case, options)
    elif what == "ours":
        choose(case, options)
    else:
        compile_peer(case, options)


if __name__ == "__main__":
    _main(*sys.argv[1:])

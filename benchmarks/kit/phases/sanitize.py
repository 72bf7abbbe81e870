"""compute-sanitizer over every family of kernels, a process each: memcheck and racecheck; then steps of training.

In a rehearsal the families run in the simulator, which has checks of its own.
"""

from __future__ import annotations

import re
import sys
import time

from .. import pool
from ..options import Options
from ..tools import tool
from ..worker import Emit

__all__ = ["commands", "errors", "items", "run"]

# By name, so that torch is not needed to list them; ``families`` has them all. What takes longest comes first.
_DTYPES = ("float16", "bfloat16", "float32")
NAMES = (
    *("chains", "training", "stages", "pooled_stems"),
    *(f"conv_{kind}_{dtype}" for kind in ("triton", "cuda", "library") for dtype in _DTYPES),
    *("add_relu", "steps"),
)
# A rehearsal takes one of those that are alike; CUDA C++ would be compiled first there.
REHEARSED = ("training", "stages", "pooled_stems", "conv_triton_float16", "add_relu", "steps")
TOOLS = ("memcheck", "racecheck")
LONG = "steps of training"
ERROR_STATUS = 66


def items(options: Options) -> list[str]:
    return ["families"]


def commands(options: Options, sanitizer: str | None) -> dict[str, list[str]]:
    """By name: the long one first, it takes whatever time there is."""
    me = [sys.executable, "-m", "benchmarks.kit.families", str(options.file)]
    if sanitizer is None:
        return {"rehearsal: " + ", ".join(REHEARSED): [*me, *REHEARSED]}  # in one process, which compiles once
    # What an interface of CUDA refuses is not reported: PyTorch asks for what may not be there, and raises otherwise.
    check = [sanitizer, "--target-processes", "all", "--error-exitcode", str(ERROR_STATUS), "--print-limit", "20"]
    of_tool = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
    checks = {name: [*check, "--tool", name, *of_tool[name], *me] for name in TOOLS}
    found = {f"memcheck: {LONG}": [*checks["memcheck"], f"steps={options.checked_steps}"]}
    found |= {f"{name}: {family}": [*checks[name], family] for name in TOOLS for family in NAMES}
    return found


# Kernels of the libraries, by what their names hold: cuDNN's own are told of races, too.
LIBRARY_KERNELS = re.compile(r"sm\d\d_xmma|cudnn|cutlass|nvjet|cublas|at::native")


def errors(output: str, library: bool = False) -> list[str]:
    """What the sanitizer reports of our kernels or of a library's, each once, with the kernel."""
    kinds = "Invalid|Misaligned|Error:|Program hit|Race|Warning: Race|Leaked|Uninitialized"
    found = re.findall(rf"^========= ((?:{kinds}).*)$(?:\n=========\s+(at .*)$)?", output, re.MULTILINE)
    reports = dict.fromkeys(" ".join(filter(None, lines)) for lines in found)
    return [report for report in reports if bool(LIBRARY_KERNELS.search(report)) == library]


def _steps(output: str) -> int:
    found = re.findall(r"^steps: (\d+)$", output, re.M)
    return int(found[-1]) if found else 0


def run(item: str, options: Options, emit: Emit, deadline: float) -> None:
    sanitizer = None if options.simulated else tool("compute-sanitizer")
    if sanitizer is None and not options.simulated:
        emit({"missing": "compute-sanitizer is not installed here (PATH, /usr/local/cuda/bin): nothing was checked"})
        return
    # Without PyTorch's cache an access beyond a tensor is one beyond its memory.
    extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "RESNET_FAST_TUNE": "0"}
    late = []
    for ended in pool.run(commands(options, sanitizer), options, options.jobs, deadline - 2, extra):
        reports, others = errors(ended.output), errors(ended.output, library=True)
        row: dict[str, object] = {"check": ended.name, "reports": len(reports), "seconds": ended.seconds}
        if others:
            row["reports of libraries"] = len(others)
        if ended.name.endswith((LONG, "steps")):
            row["steps"] = _steps(ended.output)
        print(f"{ended.name}\n{ended.output[-20000:]}\n")
        if reports:
            emit({**row, "error": f"{ended.name}: {'; '.join(reports[:4])}"})
        elif ended.code and not (others and ended.code == ERROR_STATUS):
            emit({**row, "error": f"{ended.name}: ended with {ended.code}: {_reason(ended)}"})
        elif ended.code is None and not row.get("steps"):
            late.append(ended.name)
        else:
            # Steps that were cut are as good as those that were wanted: their number is told.
            emit(row)
    if late:
        raise TimeoutError(f"not ended in time: {', '.join(late)} ({time.strftime('%H:%M:%S')})")


def _reason(ended: pool.Ended) -> str:
    """The last line that is not the sanitizer's own."""
    lines = [x for x in ended.output.splitlines() if x.strip() and not x.startswith("=========")]
    return lines[-1][:300] if lines else ended.last_line

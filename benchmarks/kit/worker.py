"""The process of a phase: ``python -m benchmarks.kit.worker PHASE OPTIONS ROWS DEADLINE SKIP``."""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from .machine import versions
from .options import Options

__all__ = ["Emit", "main"]

Emit = Callable[[dict[str, Any]], None]
BROKEN = 3  # exit status: the CUDA context is lost, a new process goes on with the next item


@contextlib.contextmanager
def _surroundings(options: Options) -> Iterator[None]:
    if not options.simulated:
        yield
        return
    from .rehearsal import rehearsal

    with rehearsal():
        yield


def _context_lost() -> bool:
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main(arguments: list[str]) -> int:
    # What the phase has started ends with it: exceptions run what stands behind ``finally``.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    name, path, rows, deadline, skip = arguments
    options = Options.load(path)
    phase = importlib.import_module(f"benchmarks.kit.phases.{name}")
    with open(rows, "a") as file, _surroundings(options):

        def write(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        if skip == "0":
            write({"versions": versions()})
        for item in phase.items(options)[int(skip) :]:
            write({"item": item, "begin": True})
            try:
                phase.run(item, options, lambda row, item=item: write({"item": item, **row}), float(deadline))
            except Exception as error:
                traceback.print_exc()
                first = str(error).strip().splitlines() or [""]
                write({"item": item, "error": f"{type(error).__name__}: {first[0][:500]}"})
            write({"item": item, "end": True})
            if _context_lost():
                return BROKEN
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

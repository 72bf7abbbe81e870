"""A phase as a process with a time limit: a crash ends an item, not the phase, and a phase, not the run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .options import ROOT, Options

__all__ = ["Phase", "end", "run"]

_TICK = 0.2


@dataclass
class Phase:
    """What a phase has given. ``rows``: dictionaries with ``item``, and ``error`` where something went wrong."""

    name: str
    limit: float
    state: str = "running"
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "error" in row]


class _Tail:
    """The lines that a file of rows has got since it was last asked; a line that is half written waits."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0

    def lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.at)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.at += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()]


def end(process: subprocess.Popen[Any]) -> None:
    """Ends a process with all that it started: it leads a session of its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            continue
    # Children may outlive a leader that ended at once.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def run(name: str, options: Options, limit: float, notice: Callable[[Phase], object]) -> Phase:
    """Runs a phase; ``notice`` is called whenever it has given something."""
    phase = Phase(name, limit)
    begin, log = time.monotonic(), Path(options.work, "logs", f"{name}.log")
    rows = Path(options.work, f"{name}.jsonl")
    rows.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    tail = _Tail(rows)
    begun: list[str] = []
    deadline = time.time() + limit
    command = [sys.executable, "-m", "benchmarks.kit.worker", name, str(options.save()), str(rows), str(deadline)]
    while True:
        before, open_item = len(begun), None
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*command, str(len(begun))],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=options.environment(),
                cwd=ROOT,
                start_new_session=True,
            )
        late = False
        try:
            while True:
                code = process.poll()
                found = tail.lines()
                for line in found:
                    if line.get("begin"):
                        begun.append(line["item"])
                        open_item = line["item"]
                    elif line.get("end"):
                        open_item = None
                    elif "versions" in line:
                        phase.versions = line["versions"]
                    else:
                        phase.rows.append(line)
                phase.seconds = time.monotonic() - begin
                if found:
                    notice(phase)
                if code is not None:
                    break
                # What runs has a few seconds to end by itself.
                if late := time.time() > deadline + 3:
                    break
                time.sleep(_TICK)
        finally:
            end(process)
        if late or (code != 0 and time.time() > deadline):
            phase.state = "time limit"
            if open_item is not None:
                phase.rows.append({"item": open_item, "error": f"ended at the time limit of {limit:.0f} s"})
            break
        if code == 0:
            phase.state = "done"
            break
        if len(begun) == before:
            phase.state = "failed"
            phase.rows.append({"item": name, "error": f"does not start: {_last_line(log)}"})
            break
        if open_item is not None:
            phase.rows.append({"item": open_item, "error": f"{_exit(code)}: {_last_line(log)}"})
    phase.seconds = time.monotonic() - begin
    notice(phase)
    return phase


def _exit(code: int | None) -> str:
    assert code is not None
    return f"crashed with signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with status {code}"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "no output"

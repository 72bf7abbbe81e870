"""A phase as a process with a time limit: a crash ends an item, not the phase, and a phase, not the run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
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


class _Progress:
    """What the processes of a phase have written so far; a line that is half written waits."""

    def __init__(self, phase: Phase, path: Path) -> None:
        self.phase, self.path = phase, path
        self.begun = 0  # items
        self._at, self._open = 0, ""  # the item that is under way
        path.unlink(missing_ok=True)

    def read(self) -> bool:
        """Takes what is new; whether there was something."""
        if not self.path.exists():
            return False
        with self.path.open("rb") as file:
            file.seek(self._at)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._at += len(whole) + len(newline)
        for line in map(json.loads, whole.splitlines()):
            if line.get("begin"):
                self.begun += 1
                self._open = line["item"]
            elif line.get("end"):
                self._open = ""
            elif "versions" in line:
                self.phase.versions = line["versions"]
            else:
                self.phase.rows.append(line)
        return bool(whole)

    def fail(self, reason: str) -> None:
        """The item that was under way, if there was one, has ended so."""
        if self._open:
            self.phase.rows.append({"item": self._open, "error": reason})
            self._open = ""


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


def run(
    name: str,
    options: Options,
    limit: float,
    notice: Callable[[Phase], object],
    stop: threading.Event | None = None,
) -> Phase:
    """Runs a phase; ``notice`` is called whenever it has given something. It ends early when ``stop`` is set."""
    stop = stop or threading.Event()
    phase, log = Phase(name, limit), Path(options.work, "logs", f"{name}.log")
    log.unlink(missing_ok=True)
    progress = _Progress(phase, Path(options.work, f"{name}.jsonl"))
    begin, deadline = time.monotonic(), time.time() + limit
    command = [sys.executable, "-m", "benchmarks.kit.worker", name, str(options.file), str(progress.path)]
    while phase.state == "running":
        before = progress.begun
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*command, str(deadline), str(before)],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=options.environment(),
                cwd=ROOT,
                start_new_session=True,
            )
        try:
            # What runs has a few seconds to end by itself.
            while (code := process.poll()) is None and time.time() < deadline + 3 and not stop.wait(_TICK):
                phase.seconds = time.monotonic() - begin
                if progress.read():
                    notice(phase)
        finally:
            end(process)
        progress.read()
        if stop.is_set():
            phase.state = "stopped"
        elif code == 0:
            phase.state = "done"
        elif time.time() > deadline:
            phase.state = "time limit"
            progress.fail(f"ended at the time limit of {limit:.0f} s")
        elif progress.begun == before:
            phase.state = "failed"
            phase.rows.append({"item": name, "error": f"does not start: {_last_line(log)}"})
        else:
            progress.fail(f"{_exit(code)}: {_last_line(log)}")
    phase.seconds = time.monotonic() - begin
    notice(phase)
    return phase


def _exit(code: int | None) -> str:
    assert code is not None
    return f"crashed with signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with status {code}"


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "no output"

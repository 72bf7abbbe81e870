"""Commands in parallel, a few at a time, until a point in time."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .options import ROOT, Options
from .supervise import end

__all__ = ["Ended", "run"]


@dataclass(frozen=True)
class Ended:
    """``code`` is None where the time was over."""

    name: str
    code: int | None
    seconds: float
    output: str

    @property
    def last_line(self) -> str:
        lines = [line for line in self.output.splitlines() if line.strip()]
        return lines[-1][:300] if lines else "no output"


def run(
    commands: dict[str, list[str]], options: Options, jobs: int, deadline: float, extra: dict[str, str] | None = None
) -> Iterator[Ended]:
    """Runs ``commands`` by name, ``jobs`` at a time, in the order given; ``extra``: of their environment."""
    waiting = list(commands.items())
    running: dict[str, tuple[subprocess.Popen[bytes], float, Path]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs and time.time() < deadline:
                name, command = waiting.pop(0)
                log = Path(options.work, "logs", re.sub(r"[^\w.-]+", "_", name) + ".out")
                with log.open("wb") as out:
                    process = subprocess.Popen(
                        command,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        env={**options.environment(), **(extra or {})},
                        cwd=ROOT,
                        start_new_session=True,
                    )
                running[name] = process, time.time(), log
            over = time.time() > deadline
            for name, (process, begin, log) in list(running.items()):
                code = process.poll()
                if code is None and not over:
                    continue
                end(process)
                del running[name]
                yield Ended(name, code, time.time() - begin, log.read_text(errors="replace"))
            if over:
                yield from (Ended(name, None, 0.0, "was not started") for name, _ in waiting)
                return
            time.sleep(0.1)
    finally:
        for process, *_ in running.values():
            end(process)

"""``run.sh``, ``python -m benchmarks.kit``: the phases one after another, each with its share of the time left."""

from __future__ import annotations

import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import results
from .options import PHASES, SIDE_BY_SIDE, Options, parse
from .supervise import Phase, run

__all__ = ["main"]

_LOG_BYTES = 400_000  # of each phase in log.txt


def _collect(options: Options) -> None:
    """The logs as one file, and what was measured and chosen on this GPU, beside the results."""
    with Path(options.out, "log.txt").open("wb") as out:
        for name in options.only:
            log = Path(options.work, "logs", f"{name}.log")
            if log.exists():
                out.write(f"===== {name}\n".encode() + log.read_bytes()[-_LOG_BYTES:])
    choices = Path(options.work, "choices")
    for file in choices.glob("gpu-*.json") if choices.exists() else ():
        Path(options.out, "choices").mkdir(exist_ok=True)
        shutil.copy(file, Path(options.out, "choices", file.name))


def _say(phase: Phase) -> None:
    print(f"{phase.name}: {phase.state} after {phase.seconds:.0f} s, {len(phase.rows)} rows", flush=True)
    for row in phase.rows:
        if "missing" in row:
            print(f"  missing: {row['missing']}")
        if "error" in row:
            print(f"  {row.get('variant') or row['item']}: {row['error']}")
    sys.stdout.flush()


def _groups(names: tuple[str, ...]) -> list[list[str]]:
    """Those that run at the same time, in their order."""
    together = [name for name in names if name in SIDE_BY_SIDE]
    groups = [[name] for name in names if name not in SIDE_BY_SIDE]
    return [*groups, together] if together else groups


def _run(group: list[str], options: Options, limit: float, done: list[Phase]) -> list[Phase]:
    current: dict[str, Phase] = {}
    lock, stop = threading.Lock(), threading.Event()

    def notice(phase: Phase) -> None:
        with lock:
            current[phase.name] = phase
            results.write([*done, *current.values()], options)

    def one(name: str) -> Phase:
        phase = run(name, options, limit, notice, stop)
        with lock:
            _say(phase)
        return phase

    with ThreadPoolExecutor(len(group)) as pool:
        try:
            return list(pool.map(one, group))
        finally:
            stop.set()  # where this was ended from outside, what runs ends, too


def main(arguments: list[str] | None = None) -> int:
    """0 where all phases ended by themselves and nothing failed."""
    options = parse(arguments)
    # What is ended from outside leaves its results: exceptions run what stands behind ``finally``.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    end = time.monotonic() + 60 * options.minutes
    done: list[Phase] = []
    shares = {name: PHASES[name] for name in options.only}
    try:
        for group in _groups(options.only):
            share = sum(shares[name] for name in group)
            limit = max(5.0, (end - time.monotonic()) * share / sum(shares.values()))
            for name in group:
                del shares[name]
            print(f"{' beside '.join(group)}: at most {limit:.0f} s", flush=True)
            done += _run(group, options, limit, done)
            _collect(options)
    finally:
        _collect(options)
    reason = results.chart(done, options)
    print(results.write(done, options))
    print(f"written to {options.out}: results.json, results.md, log.txt{', results.png' if reason is None else ''}")
    if reason is not None:
        print(f"no chart: {reason}")
    return int(any(phase.state != "done" or phase.failures for phase in done))


if __name__ == "__main__":
    sys.exit(main())

"""``run.sh``, ``python -m benchmarks.kit``: the phases one after another, each with its share of the time left."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from pathlib import Path

from . import results
from .options import PHASES, Options, parse
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


def main(arguments: list[str] | None = None) -> int:
    """0 where all phases ended by themselves and nothing failed."""
    options = parse(arguments)
    # What is ended from outside leaves its results: exceptions run what stands behind ``finally``.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    end = time.monotonic() + 60 * options.minutes
    done: list[Phase] = []
    shares = {name: PHASES[name] for name in options.only}
    try:
        for name in options.only:
            limit = max(5.0, (end - time.monotonic()) * shares[name] / sum(shares.values()))
            del shares[name]
            print(f"{name}: at most {limit:.0f} s", flush=True)
            phase = run(name, options, limit, lambda now: results.write([*done, now], options))
            done.append(phase)
            _say(phase)
            results.write(done, options)
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

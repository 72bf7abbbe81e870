"""``tests/gpu`` by pytest. What has passed and failed is read from its output, so that a cut run counts, too."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path

from ..options import ROOT, Options
from ..supervise import end
from ..worker import Emit

__all__ = ["command", "items", "outcomes", "run"]

# "PASSED tests/..." of pytest-xdist, "tests/...::test PASSED" of pytest alone.
_RESULT = re.compile(r"(?:(PASSED|FAILED|ERROR|SKIPPED|XFAIL) (\S+::.+)|(\S+::.+) (PASSED|FAILED|ERROR|SKIPPED|XFAIL))")
# What the rehearsal runs of them: a few, small ones.
_SMALL = "blocks and float32 or ops and bfloat16 and (test_add or average)"


# Tests that take times have the GPU for themselves.
TOGETHER, ALONE = "tests/gpu", "tests/gpu, one at a time"


def items(options: Options) -> list[str]:
    return [TOGETHER] if options.simulated else [TOGETHER, ALONE]


def command(options: Options, item: str = TOGETHER) -> list[str]:
    files = sorted(str(path.relative_to(ROOT)) for path in Path(ROOT, "tests/gpu").glob("gpu_*.py"))
    found = [sys.executable, "-m", "pytest", *files, "-v", "--tb=short", "-p", "no:cacheprovider", "--color=no"]
    if options.simulated:
        return [*found, "--simulated", "-k", _SMALL]
    if item == ALONE:
        return [*found, "-m", "alone"]
    found += ["-m", "not alone"]
    if importlib.util.find_spec("xdist"):
        found += ["-n", str(options.workers)]
    return found


def outcomes(output: str) -> dict[str, str]:
    """``PASSED`` and so on by test, from the lines before pytest's summary."""
    found = {}
    for line in output.splitlines():
        if re.match(r"=+ (FAILURES|ERRORS|short test summary)", line):
            break
        line = re.sub(r"\s+\[\s*\d+%\]\s*$", "", line)
        line = re.sub(r"^\[gw\d+\] (\[\s*\d+%\] )?", "", line)
        if match := _RESULT.fullmatch(line.strip()):
            before, test, named, after = match.groups()
            found[test or named] = before or after
    return found


def run(item: str, options: Options, emit: Emit, deadline: float) -> None:
    if importlib.util.find_spec("pytest") is None:
        emit({"missing": "pytest is not installed here: the tests did not run"})
        return
    if len(items(options)) > 1 and item == TOGETHER:  # a quarter of the time is for those behind
        deadline = time.time() + 0.75 * (deadline - time.time())
    log = Path(options.work, "logs", f"pytest {items(options).index(item)}.out")
    with log.open("wb") as out:
        process = subprocess.Popen(
            command(options, item),
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=options.environment(),
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(max(1, deadline - time.time() - 2))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    output = log.read_text(errors="replace")
    found = outcomes(output)
    states = {"passed": "PASSED", "failed": "FAILED", "errors": "ERROR", "skipped": "SKIPPED"}
    counts = {name: list(found.values()).count(state) for name, state in states.items()}
    emit({"tests": len(found), **counts})
    reasons = dict(re.findall(r"^(?:FAILED|ERROR) (\S+::.+?) - (.*)$", output, re.MULTILINE))
    for test, state in found.items():
        if state in ("FAILED", "ERROR"):
            emit({"test": test, "error": f"{state}: {reasons.get(test, 'see the log')}"})
    print(output)
    if code is None:
        raise TimeoutError(f"the tests were cut at the time limit, {len(found)} of them had ended")
    if code != 0 and not counts["failed"] and not counts["errors"]:
        raise RuntimeError(f"pytest ended with {code}: {(output.strip().splitlines() or ['no output'])[-1]}")

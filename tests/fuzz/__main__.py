"""``python -m tests.fuzz --minutes 10 --seed N``: random trials until time is up; the numbers of those that fail.

Trials run in a process of their own: one that crashes or hangs is a failure as any other. ``--trials 1`` replays one.
"""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fuzz import KINDS, begin, trial

PATIENCE = 300  # seconds for a trial, which takes one or two


class Process:
    """Runs one trial after the other; a new one takes the place of one that ended."""

    def __init__(self):
        self.pool = None

    def run(self, kind, seed):
        self.pool = self.pool or ProcessPoolExecutor(1, get_context("spawn"), begin)
        try:
            return self.pool.submit(trial, kind, seed).result(PATIENCE)
        except BrokenProcessPool:
            self.end()
            return "The process died."
        except TimeoutError:
            self.end()
            return f"It did not end within {PATIENCE} s."

    def end(self):
        if self.pool is not None:
            for process in list(self.pool._processes.values()):
                process.kill()
            self.pool.shutdown()
        self.pool = None


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)}; default: all in turn")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0, help="the first number")
    parser.add_argument("--trials", type=int, help="of each kind at most")
    options = parser.parse_args()
    kinds = options.kinds or list(KINDS)
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"KIND is {unknown.pop()}, want one of {', '.join(KINDS)}")
    end, process, failed, done = time.monotonic() + 60 * options.minutes, Process(), [], 0
    while (options.trials is None or done < options.trials) and time.monotonic() < end:
        for kind in kinds:
            fault = process.run(kind, options.seed + done)
            if fault is not None:
                failed.append(f"python -m tests.fuzz {kind} --seed {options.seed + done} --trials 1")
                print(f"{fault}\n{failed[-1]}\n", flush=True)
        done += 1
    process.end()
    print(f"{done} trials each of {', '.join(kinds)}; failed: {len(failed)}", *failed, sep="\n    ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

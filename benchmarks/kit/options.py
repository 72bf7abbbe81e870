"""What a run is told: its phases, their shares of the time, its folders. Nothing here imports torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["PHASES", "ROOT", "SIDE_BY_SIDE", "Options", "parse"]

# The folder that holds resnet_fast, benchmarks and tests: the kit, or the repository.
ROOT = Path(__file__).resolve().parent.parent.parent
# Phases in order, and shares of the time; what a phase leaves over goes to those behind it. What is compiled by warm
# serves those that follow.
PHASES = {
    "doctor": 5,
    "warm": 17,
    "infer": 19,
    "train": 9,
    "profile": 6,
    "tests": 18,
    "soak": 9,
    "sanitize": 17,
}
# These run at the same time, in the time of all: no clock is read, and the GPU that they share is one more hardship.
SIDE_BY_SIDE = ("soak", "sanitize")


@dataclass(frozen=True)
class Options:
    """``cases``: of infer, train and profile where they are named; each has its own list otherwise."""

    out: str
    work: str
    minutes: float = 8.0
    only: tuple[str, ...] = tuple(PHASES)
    dtype: str = "float16"
    cases: tuple[str, ...] = ()
    steps: int = 1000  # of soak
    checked_steps: int = 2000  # of training under memcheck
    seconds: float = 3.0  # of samples for a case
    rounds: int = 15
    workers: int = 4  # of pytest-xdist
    jobs: int = 10  # processes at a time that share the GPU
    ncu: str = ""  # a kernel's name
    compiled: bool = True  # whether torch.compile, which takes a minute a case, is among the peers
    simulated: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.simulated else "cuda"

    def environment(self) -> dict[str, str]:
        """Of the processes of a phase: modules come from here, caches stay in the work folder."""
        own = {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *([str(ROOT / "tests")] if self.simulated else [])]),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            "RESNET_FAST_CACHE": str(Path(self.work, "choices")),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(self.work, "inductor")),
        }
        if not self.simulated:
            own["TRITON_CACHE_DIR"] = str(Path(self.work, "triton"))
        return {**os.environ, **own}

    @property
    def file(self) -> Path:
        """Where the processes of the phases read them."""
        return Path(self.work, "options.json")

    def save(self) -> None:
        self.file.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, path: str) -> Options:
        read: dict[str, Any] = json.loads(Path(path).read_text())
        lists = {name: tuple(value) for name, value in read.items() if isinstance(value, list)}
        return cls(**{**read, **lists})


def parse(arguments: list[str] | None = None) -> Options:
    """The options of a command line; makes both folders, and a file of them for the phases."""
    parser = argparse.ArgumentParser(prog="run.sh", description="resnet_fast on this machine's GPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all phases together (default 8)")
    parser.add_argument("--only", nargs="+", choices=[*PHASES], metavar="PHASE", help=f"of {', '.join(PHASES)}")
    parser.add_argument("--out", default="results", help="folder of results.json, .md, .png and log.txt")
    parser.add_argument("--work", help="folder of caches, kept from run to run (default: in the system's for such)")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], help="of infer (default float16)")
    parser.add_argument(
        "--case", nargs="+", action="append", default=[], metavar="WORD", help="MODEL BATCH [SIZE] [training]; again"
    )
    parser.add_argument("--steps", type=int, default=1000, help="of soak (default 1000)")
    parser.add_argument("--checked-steps", type=int, default=2000, help="under memcheck, as far as time goes")
    parser.add_argument("--seconds", type=float, default=3.0, help="of samples for a case of infer and train")
    parser.add_argument("--rounds", type=int, default=15, help="of samples, where they fit into the seconds")
    parser.add_argument("--workers", type=int, default=4, help="of pytest, where pytest-xdist is installed")
    parser.add_argument("--jobs", type=int, default=10, help="processes at a time in sanitize and warm")
    parser.add_argument("--ncu", default="", metavar="KERNEL", help="profile: counters of kernels of that name")
    parser.add_argument("--no-compiled", action="store_true", help="without torch.compile among the peers")
    parser.add_argument("--simulated", action="store_true", help="small shapes on the simulated device: a rehearsal")
    found = parser.parse_args(arguments)
    work = found.work or Path(tempfile.gettempdir(), f"resnet_fast-gpu-kit-{os.getuid()}")
    options = Options(
        out=str(Path(found.out).resolve()),
        work=str(Path(work).resolve()),
        only=tuple(name for name in PHASES if not found.only or name in found.only),
        dtype=found.dtype or ("bfloat16" if found.simulated else "float16"),
        # "--case ResNet32 64" and "--case 'ResNet32 64'" are the same.
        cases=tuple(" ".join(words) for words in found.case),
        minutes=found.minutes,
        steps=found.steps,
        checked_steps=found.checked_steps,
        seconds=found.seconds,
        rounds=found.rounds,
        workers=found.workers,
        jobs=found.jobs,
        ncu=found.ncu,
        compiled=not found.no_compiled,
        simulated=found.simulated,
    )
    for folder in (options.out, options.work, Path(options.work, "logs")):
        Path(folder).mkdir(parents=True, exist_ok=True)
    options.save()
    return options

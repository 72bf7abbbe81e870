"""Puts the kit together: ``python -m benchmarks.kit.pack LIBRARY FOLDER``, as ``make gpu-kit`` does."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from .options import ROOT

__all__ = ["MOST_BYTES", "pack", "size"]

MOST_BYTES = 60 * 10**6
# What lies where in the kit; folders come whole, but for what is never copied.
PARTS = {
    "resnet_fast": "resnet_fast",
    "kernels/triton_ops": "resnet_fast/_triton",  # where the package imports it from when it is installed
    "benchmarks": "benchmarks",
    "tests/gpu": "tests/gpu",
    "tests/helpers": "tests/helpers",
    "tests/ptxsim": "tests/ptxsim",  # conftest.py imports it; a rehearsal runs on it
    "tests/*.py": "tests",  # what tests/gpu and conftest.py share
    "benchmarks/results/README.md": "benchmarks/results/README.md",  # a benchmark's report wants the folder
    "pyproject.toml": "pyproject.toml",  # pytest's settings
    "LICENSE": "LICENSE",
    "benchmarks/kit/run.sh": "run.sh",
}
_IGNORED = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc", "_triton", "results", ".*", "test_*.py", "zoo")


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def pack(library: Path, folder: Path, most: int = MOST_BYTES) -> None:
    """Writes the kit into ``folder``, which is made anew; ``library``: the extension.

    Raises:
        FileNotFoundError: there is no such library.
        RuntimeError: the kit is larger than ``most`` bytes.
    """
    if not library.is_file():
        raise FileNotFoundError(f"library is {library}, want the extension that setup.py has built")
    shutil.rmtree(folder, ignore_errors=True)
    for source, target in PARTS.items():
        here, there = ROOT / source, folder / target
        if here.is_dir():
            shutil.copytree(here, there, ignore=_IGNORED, dirs_exist_ok=True)
            continue
        (there.parent if here.is_file() else there).mkdir(parents=True, exist_ok=True)
        for file in [here] if here.is_file() else here.parent.glob(here.name):
            if not file.name.startswith("test_"):
                shutil.copy(file, there)
    copied = folder / "resnet_fast" / library.name
    shutil.copy(library, copied)
    subprocess.run(["strip", "--strip-unneeded", str(copied)], check=True)
    found = size(folder)
    if found > most:
        raise RuntimeError(f"the kit has {found / 1e6:.1f} MB, want {most / 1e6:.0f} at most: fewer architectures?")


def main() -> int:
    if len(sys.argv) != 3:
        print("usage: python -m benchmarks.kit.pack LIBRARY FOLDER", file=sys.stderr)
        return 2
    library, folder = map(Path, sys.argv[1:])
    pack(library, folder)
    print(f"{folder.resolve()}: {size(folder) / 1e6:.1f} MB; there: ./run.sh --minutes 8 --out results")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Builds the simulator with the system's g++ on first use; cached by the hash of source and flags."""

import ctypes
import hashlib
import os
import pathlib
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor

SOURCE = pathlib.Path(__file__).parent / "src"
INCLUDE = [f"-I{SOURCE / folder}" for folder in ("", "frontend")]
# No -ffast-math, no contraction: results must be those the PTX asks for.
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-ffp-contract=off", "-frounding-math", "-fvisibility=hidden", "-Wno-psabi"]
COLD = {"allocate", "api", "lex", "lower", "parse", "statements"}  # run once for each kernel: compiled fast instead
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-O1"]


def cpu_flags() -> list[str]:
    """The newest baseline this CPU has; part of the hash, so that a cache may be shared."""
    try:
        have = set(pathlib.Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    except (OSError, IndexError):
        have = set()
    return ["-march=x86-64-v3"] if {"avx2", "fma", "bmi2", "f16c", "movbe"} <= have else []


def cache_folder() -> pathlib.Path:
    root = os.environ.get("PTXSIM_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ptxsim"
    )
    return pathlib.Path(root)


def build(sanitize: bool = False) -> pathlib.Path:
    """Path of the shared library, compiled if need be; objects are cached too, one change compiles one file."""
    flags = FLAGS + cpu_flags() + (SANITIZE if sanitize else [])
    compiler = os.environ.get("CXX", "g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    common = "\0".join([compiler, version, *flags, *(p.read_text() for p in sorted(SOURCE.rglob("*.h")))])

    def key(*texts: str) -> str:
        return hashlib.sha256("\0".join([common, *texts]).encode()).hexdigest()[:20]

    def run(target: pathlib.Path, *arguments: str) -> None:
        with tempfile.NamedTemporaryFile(dir=target.parent, suffix=target.suffix, delete=False) as partial:
            pass
        command = [compiler, *flags, *INCLUDE, *arguments, "-o", partial.name]
        # A sanitizer preloaded for the tests must not slow the compiler down.
        clean = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
        done = subprocess.run(command, capture_output=True, text=True, env=clean)
        if done.returncode:
            os.unlink(partial.name)
            raise RuntimeError(f"building the PTX simulator failed:\n{done.stderr}")
        os.chmod(partial.name, 0o755)
        os.replace(partial.name, target)  # atomic: two processes may build at once

    sources = sorted(SOURCE.rglob("*.cpp"))
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{key(*(p.read_text() for p in sources))}.so"
    if library.exists():
        return library
    # One precompiled header for all files: most of the compile time is the standard library's headers.
    headers = folder / f"{key()}.h"
    headers.write_text(
        "".join(f'#include "{SOURCE / name}"\n' for name in ("access.h", "floats.h")) + "#include <algorithm>\n"
    )
    if not (precompiled := headers.with_suffix(".h.gch")).exists():
        run(precompiled, "-x", "c++-header", str(headers))
    objects = {p: folder / f"{p.stem}-{key(p.read_text())}.o" for p in sources}

    def compile_one(p: pathlib.Path) -> None:
        run(objects[p], "-include", str(headers), *(["-O1"] if p.stem in COLD else []), "-c", str(p))

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(compile_one, [p for p in sources if not objects[p].exists()]))
    run(library, "-shared", *map(str, objects.values()))
    return library


def load() -> ctypes.CDLL:
    return ctypes.CDLL(str(build(sanitize=os.environ.get("PTXSIM_SANITIZE") == "1")))

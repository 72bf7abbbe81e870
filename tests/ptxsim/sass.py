"""Machine code of kernels, read from cubins with the cuobjdump and nvdisasm of the Triton wheel: no GPU.

nvdisasm takes most of a second to start: what it found is kept beside the simulator's cache, by the bytes of the cubin.
"""

import collections
import functools
import hashlib
import json
import os
import pathlib
import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton.backends.nvidia

from .build import cache_folder

TOOLS = pathlib.Path(triton.backends.nvidia.__path__[0], "bin")
ARCHS = (80, 90, 100)
# Shared memory in bytes a block may have, and an SM has (CUDA programming guide, table of compute capabilities).
SHARED_BLOCK = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}


@dataclass(frozen=True)
class Code:
    """One kernel for one architecture. stack and local: bytes a thread; shared: bytes a block."""

    arch: int
    registers: int
    stack: int
    shared: int
    local: int
    lines: tuple[str, ...]  # instructions in order, predicates and all; labels end with ":"

    @functools.cached_property
    def opcodes(self) -> collections.Counter:
        """How often each stands in the code: "LDG.E.128"."""
        return opcodes(self.lines)

    def count(self, opcode: str) -> int:
        """Instructions of that first part which have all its modifiers: "LDG.128" counts LDG.E.128 and LDG.E.EF.128."""
        return count(self.opcodes, opcode)

    @property
    def spills(self) -> int:
        """Instructions on local memory."""
        return self.count("STL") + self.count("LDL")

    def blocks(self, threads: int, shared: int) -> int:
        """Blocks an SM holds at once: 64K registers in units of 256 a warp, 64 warps, shared memory + 1 KB a block."""
        warps = threads // 32
        by_registers = 65536 // (-(-self.registers * 32 // 256) * 256 * warps)
        return min(32, 64 // warps, by_registers, SHARED_SM[self.arch] // (shared + 1024))


def opcodes(lines) -> collections.Counter:
    """Predicates are left out, NOPs that fill the last line, too."""
    found = (re.match(r"(?:@!?U?P\w+ +)?([A-Z][\w.]*)", line) for line in lines if not line.startswith(".L"))
    return collections.Counter(m[1] for m in found if m and m[1] != "NOP")


def count(found: collections.Counter, opcode: str) -> int:
    first, *modifiers = opcode.split(".")
    return sum(n for name, n in found.items() if (p := name.split("."))[0] == first and set(modifiers) <= set(p))


def read(cubin: bytes, arch: int) -> dict[str, Code]:
    """The kernels of a cubin by their mangled names."""
    used = os.stat(TOOLS / "nvdisasm").st_mtime_ns, pathlib.Path(__file__).read_text()
    kept = cache_folder() / f"sass-{hashlib.sha256(cubin + str(used).encode()).hexdigest()[:24]}.json"
    if not kept.exists():
        partial = kept.with_suffix(f".{os.getpid()}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "kernel.cubin")
            path.write_bytes(cubin)
            partial.write_text(json.dumps(_disassembled(str(path))))
        os.replace(partial, kept)  # whole or not at all: two processes may read the same cubin
    return {name: Code(arch, *usage, tuple(lines)) for name, (usage, lines) in json.loads(kept.read_text()).items()}


def _disassembled(path):
    usage = {
        m[1]: tuple(map(int, m.groups()[1:]))
        for m in re.finditer(
            r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", tool("cuobjdump", "-res-usage", path)
        )
    }
    lines = collections.defaultdict(list)
    name = None
    for line in tool("nvdisasm", "-c", path).splitlines():
        if section := re.match(r"\s*\.section\s+(\S+?),", line):
            name = section[1].removeprefix(".text.") if section[1].startswith(".text.") else None
        elif name and (label := re.match(r"(\.L_x_\d+:)", line)):
            lines[name].append(label[1])
        elif name and (instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+([^;]+);", line)):
            lines[name].append(instruction[1].strip())
    return {name: (usage[name], found) for name, found in lines.items()}


def tool(name, *arguments, cwd=None) -> str:
    done = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, cwd=cwd)
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"{name} failed: {done.stderr}")
    return done.stdout

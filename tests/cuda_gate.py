"""What ptxas made of the extension's own CUDA kernels, for each architecture: read out of the installed library.

    sass = cuda_gate.kernels(90, name)[name]
    assert sass.spills == 0 and sass.count("LDG.128")

The library is read with the cuobjdump of the Triton wheel; nothing is compiled here.
"""

import collections
import contextlib
import functools
import pathlib
import re
import tempfile
from dataclasses import dataclass

from triton_gate import SHARED_SM, _cubin, _tool

from resnet_fast import _C


@dataclass(frozen=True)
class Kernel:
    """registers: of a thread; local: bytes of a thread's stack and local memory; code: (address, instruction) each."""

    registers: int
    local: int
    code: tuple[tuple[int, str], ...]

    @functools.cached_property
    def opcodes(self) -> collections.Counter:
        return collections.Counter(_opcode(text) for _, text in self.code)

    def count(self, opcode: str) -> int:
        """Instructions of that first part which have all its modifiers: "LDG.128" counts LDG.E.128, too."""
        return _count(self.opcodes, opcode)

    @property
    def spills(self) -> int:
        return self.count("STL") + self.count("LDL")

    def loops(self) -> list[collections.Counter]:
        """The opcodes of each innermost loop."""
        found = []
        for at, text in self.code:
            jump = re.match(r"(?:@!?U?P\w+ +)?BRA\S* .*?0x([0-9a-f]+)", text)
            if jump and int(jump[1], 16) < at:
                found.append((int(jump[1], 16), at))
        inner = [a for a in found if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in found)]
        return [collections.Counter(_opcode(t) for at, t in self.code if low <= at <= high) for low, high in inner]

    def blocks_per_sm(self, arch: int, threads: int, shared: int) -> int:
        """Blocks an SM holds at once: 64K registers in units of 256 a warp, 64 warps, shared memory + 1 KB a block."""
        warps = threads // 32
        by_registers = 65536 // (-(-self.registers * 32 // 256) * 256 * warps)
        return min(32, 64 // warps, by_registers, SHARED_SM[arch] // (shared + 1024))


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+ +", "", text).split()[0]


def _count(opcodes: collections.Counter, opcode: str) -> int:
    first, *modifiers = opcode.split(".")
    return sum(n for name, n in opcodes.items() if (p := name.split("."))[0] == first and set(modifiers) <= set(p))


def per_mma(loop: collections.Counter) -> float:
    """Other instructions for each mma."""
    products = _count(loop, "HMMA")
    return (loop.total() - products) / products


@functools.cache
def _cubins(arch: int) -> dict[str, bytes]:
    """The extension's cubins for an architecture, by file name: one of each source file."""
    names = re.findall(rf"\S+\.sm_{arch}\.cubin", _tool("cuobjdump", "-lelf", _C.__file__))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        _tool("cuobjdump", "-lelf", "-xelf", f"sm_{arch}.cubin", _C.__file__)
        return {name: pathlib.Path(name).read_bytes() for name in names}


@functools.cache
def kernels(arch: int, containing: str) -> dict[str, Kernel]:
    """By name, the kernels for an architecture that were compiled together with the one ``containing``."""
    for data in _cubins(arch).values():
        with _cubin(data) as path:
            usage = _tool("cuobjdump", "-res-usage", path)
            if f"Function {containing}:" in usage:
                return _parse(usage, _tool("cuobjdump", "-sass", path))
    raise LookupError(f"the extension has no kernel {containing} for sm_{arch}: was TORCH_CUDA_ARCH_LIST set?")


def _parse(usage: str, sass: str) -> dict[str, Kernel]:
    resources = {
        name: (int(registers), int(stack) + int(local))
        for name, registers, stack, local in re.findall(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage
        )
    }
    found = {}
    for part in sass.split("Function : ")[1:]:
        name = part.split(None, 1)[0]
        code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;", part)
        found[name] = Kernel(*resources[name], tuple((int(at, 16), text) for at, text in code))
    return found

"""What nvcc made of the CUDA kernels: the machine code that the extension holds, for every architecture in it.

    for kernel in gate.kernels():
        assert kernel.spills == 0 and kernel.count("LDGSTS.128")

It is read from the built module with the cuobjdump and nvdisasm of the Triton wheel: no GPU, no compilation.
"""

import collections
import concurrent.futures
import functools
import os
import pathlib
import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton.backends.nvidia
from helpers.triton_gate import SHARED_SM

import resnet_fast._C

TOOLS = pathlib.Path(triton.backends.nvidia.__path__[0], "bin")
_NAME = r"_ZN11resnet_fast4cuda\d+([a-z_0-9]+_kernel)I(6__half|13__nv_bfloat16|f|d)((?:L[bi]\d+E)*)E"
_STAGE_NAME = r"(residual_stage_\w+)_(float16|bfloat16|float32)"
_TYPES = {"6__half": "float16", "13__nv_bfloat16": "bfloat16", "f": "float32", "d": "float64"}


@dataclass(frozen=True)
class Binary:
    """One kernel for one architecture. values: of its template's arguments after the type, a convolution's tile or
    flags; stack and local: bytes a thread; shared: static bytes a block."""

    arch: int
    stem: str  # "conv_bn_relu_fwd_kernel"
    dtype: str
    values: tuple[int, ...]
    registers: int
    stack: int
    local: int
    shared: int
    code: tuple[str, ...]  # instructions in order, predicates and all; labels end with ":"

    @functools.cached_property
    def opcodes(self) -> collections.Counter:
        return _opcodes(self.code)

    def count(self, opcode: str) -> int:
        """Instructions of that first part which have all its modifiers: "LDG.128" counts LDG.E.128, too."""
        return _count(self.opcodes, opcode)

    def blocks_per_sm(self, threads: int, shared: int) -> int:
        """Blocks an SM holds at once: 64K registers in units of 256 a warp, 64 warps, shared memory + 1 KB a block."""
        warps = threads // 32
        by_registers = 65536 // (-(-self.registers * 32 // 256) * 256 * warps)
        return min(32, 64 // warps, by_registers, SHARED_SM[self.arch] // (shared + 1024))

    @property
    def spills(self) -> int:
        return self.count("STL") + self.count("LDL")

    @functools.cached_property
    def _loops(self) -> list[tuple[int, int]]:
        """First and last instruction of each loop."""
        at = {line: i for i, line in enumerate(self.code) if line.endswith(":")}
        targets = ((i, re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)) for i, line in enumerate(self.code))
        return [(at[m[1] + ":"], i) for i, m in targets if m and at[m[1] + ":"] < i]

    @functools.cached_property
    def main_loop(self) -> collections.Counter:
        """Opcodes of the innermost loop that has most of the products."""
        products = next((p for p in ("HGMMA", "HMMA") if self.count(p)), "FFMA")
        bodies = [_opcodes(self.code[first : last + 1]) for first, last in self._loops]
        return max(bodies, key=lambda body: (_count(body, products), -body.total()))

    @functools.cached_property
    def inner_loops(self) -> list[collections.Counter]:
        """Opcodes of the loops with products that hold no other loop with some."""
        bodies = {loop: _opcodes(self.code[loop[0] : loop[1] + 1]) for loop in self._loops}
        busy = [loop for loop, body in bodies.items() if _count(body, "HMMA")]
        return [bodies[a] for a in busy if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in busy)]


def _opcodes(code) -> collections.Counter:
    found = (re.match(r"(?:@!?U?P\w+ +)?([A-Z][\w.]*)", line) for line in code if not line.startswith(".L"))
    return collections.Counter(m[1] for m in found if m and m[1] != "NOP")


def _count(opcodes, opcode: str) -> int:
    first, *modifiers = opcode.split(".")
    return sum(n for name, n in opcodes.items() if (p := name.split("."))[0] == first and set(modifiers) <= set(p))


@functools.cache
def kernels() -> tuple[Binary, ...]:
    with tempfile.TemporaryDirectory() as folder:
        _tool("cuobjdump", "-xelf", "all", str(pathlib.Path(resnet_fast._C.__file__).resolve()), cwd=folder)
        cubins = sorted(pathlib.Path(folder).glob("*.cubin"))
        assert cubins, "the extension holds no CUDA kernels: it was built without nvcc"
        # The tools are processes of their own: threads are enough to keep the cores busy.
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            return tuple(b for binaries in pool.map(_read, cubins) for b in binaries)


def _read(cubin):
    arch = int(re.search(r"sm_(\d+)", cubin.name)[1])
    usage = {
        m[1]: tuple(map(int, m.groups()[1:]))
        for m in re.finditer(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
            _tool("cuobjdump", "-res-usage", str(cubin)),
        )
    }
    code = collections.defaultdict(list)
    name = None
    for line in _tool("nvdisasm", "-c", str(cubin)).splitlines():
        if section := re.match(r"\s*\.section\s+(\S+?),", line):
            name = section[1].removeprefix(".text.") if section[1].startswith(".text.") else None
        elif name and (label := re.match(r"(\.L_x_\d+:)", line)):
            code[name].append(label[1])
        elif name and (instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+([^;]+);", line)):
            code[name].append(instruction[1].strip())
    found = []
    for mangled, lines in code.items():
        registers, stack, shared, local = usage[mangled]
        if m := re.fullmatch(_STAGE_NAME, mangled):
            found.append(Binary(arch, mangled, m[2], (), registers, stack, local, shared, tuple(lines)))
            continue
        m = re.match(_NAME, mangled)
        assert m, f"a kernel of another form: {mangled}"
        values = tuple(map(int, re.findall(r"L[bi](\d+)E", m[3])))
        found.append(Binary(arch, m[1], _TYPES[m[2]], values, registers, stack, local, shared, tuple(lines)))
    return found


def _tool(name, *arguments, cwd=None):
    done = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, cwd=cwd)
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"{name} failed: {done.stderr}")
    return done.stdout

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

import resnet_fast._C

TOOLS = pathlib.Path(triton.backends.nvidia.__path__[0], "bin")
_TYPES = {"6__half": "float16", "13__nv_bfloat16": "bfloat16", "f": "float32", "d": "float64"}


@dataclass(frozen=True)
class Binary:
    """One kernel for one architecture.

    dtype: the type its template begins with, else ""; values: the numbers after it, a convolution's tile or flags;
    stack and local: bytes a thread; shared: static bytes a block.
    """

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

    @property
    def spills(self) -> int:
        return self.count("STL") + self.count("LDL")

    @functools.cached_property
    def main_loop(self) -> collections.Counter:
        """Opcodes of the innermost loop that has most of the products."""
        at = {line: i for i, line in enumerate(self.code) if line.endswith(":")}
        products = "HMMA" if self.count("HMMA") else "FFMA"
        loops = []
        for i, line in enumerate(self.code):
            target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            if target and at[target[1] + ":"] < i:
                body = _opcodes(self.code[at[target[1] + ":"] : i + 1])
                loops.append((_count(body, products), -body.total(), body))
        return max(loops, key=lambda found: found[:2])[2]


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
        length, rest = re.match(r"_ZN11resnet_fast4cuda(\d+)(\w+)", mangled).groups()
        stem, arguments = rest[: int(length)], rest[int(length) :]
        m = re.match(r"I(6__half|13__nv_bfloat16|f|d)((?:L[bi]\d+E)*)E", arguments)
        dtype, values = (_TYPES[m[1]], tuple(map(int, re.findall(r"L[bi](\d+)E", m[2])))) if m else ("", ())
        registers, stack, shared, local = usage[mangled]
        found.append(Binary(arch, stem, dtype, values, registers, stack, local, shared, tuple(lines)))
    return found


def _tool(name, *arguments, cwd=None):
    done = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, cwd=cwd)
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"{name} failed: {done.stderr}")
    return done.stdout

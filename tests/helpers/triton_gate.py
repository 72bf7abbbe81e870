"""What ptxas makes of a Triton kernel on sm_80, sm_90 and sm_100, found offline: no GPU, no launch.

    for kernel, args, meta in gate.launches(op, x, w):   # what the package's own launchers ask for
        sass = gate.inspect_launch(kernel, args, meta, arch=90)
        assert sass.spills == 0 and sass.count("HGMMA") and sass.count("LDG.128")

`inspect` takes a signature instead of arguments. The cubin comes from `triton.compile` and so from Triton's cache; it
is read with the cuobjdump and nvdisasm of the Triton wheel.
"""

import collections
import contextlib
import functools
import os
import pathlib
import re
import subprocess
import tempfile
import threading
from dataclasses import dataclass

ARCHS = (80, 90, 100)
# Shared memory in bytes a block may have, and an SM has (CUDA programming guide, table of compute capabilities).
SHARED_BLOCK = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHARED_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}


@dataclass(frozen=True)
class Sass:
    """One compiled kernel. shared: bytes a block; stack: bytes a thread; spills: instructions on local memory."""

    arch: int
    threads: int
    registers: int
    shared: int
    stack: int
    opcodes: collections.Counter  # "LDG.E.128" -> how often it stands in the code
    text: str
    ptx: str

    def count(self, opcode: str) -> int:
        """Instructions of that first part which have all its modifiers: "LDG.128" counts LDG.E.128 and LDG.E.EF.128."""
        first, *modifiers = opcode.split(".")
        return sum(
            n for name, n in self.opcodes.items() if (p := name.split("."))[0] == first and set(modifiers) <= set(p)
        )

    @property
    def spills(self) -> int:
        return self.count("STL") + self.count("LDL")

    @property
    def blocks_per_sm(self) -> int:
        """Blocks an SM holds at once: 64K registers in units of 256 a warp, 64 warps, shared memory + 1 KB a block."""
        warps = self.threads // 32
        by_registers = 65536 // (-(-self.registers * 32 // 256) * 256 * warps)
        return min(32, 64 // warps, by_registers, SHARED_SM[self.arch] // (self.shared + 1024))


def inspect(kernel, signature: dict[str, str], constexprs: dict, arch: int, **options) -> Sass:
    """Compiles for `arch` with num_warps, num_stages ... in options.

    signature: the other parameters by name: "*fp16", "i32", "fp32"; "*fp16:16" and "i32:16" are known to be divisible
    by 16, as Triton's launcher finds from the values. A size of 1 becomes a constant there: put it among constexprs.
    """
    names = kernel.arg_names
    unknown = (set(signature) | set(constexprs)) - set(names)
    missing = set(names) - set(signature) - set(constexprs)
    if unknown or missing:
        raise TypeError(f"{kernel.__name__}: unknown parameters {sorted(unknown)}, missing {sorted(missing)}")
    types = {n: "constexpr" if n in constexprs else signature[n].partition(":")[0] for n in names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n in signature and signature[n].partition(":")[2] == "16"
    }
    constants = {(names.index(n),): v for n, v in constexprs.items()}
    return _compile(kernel, types, constants, attrs, arch, options)


def inspect_launch(kernel, args, meta: dict, arch: int) -> Sass:
    """Compiles what `kernel[grid](*args, **meta)` would run on `arch`; CPU tensors do."""
    _, backend, make_binder = _triton(arch)
    meta = {"debug": False, **meta}
    bound, specialization, options = make_binder(kernel.signature, kernel.params, backend)(*args, **meta)
    chosen, signature, constexprs, attrs = kernel._pack_args(backend, meta, bound, specialization, options)
    return _compile(kernel, signature, constexprs, attrs, arch, chosen.__dict__)


def launches(function, *args, **kwargs) -> list[tuple]:
    """(kernel, args, meta) of each launch `function` makes through resnet_fast.backends.launch; none is executed."""
    from resnet_fast.backends import launch

    seen: list[tuple] = []

    class Recorder:
        def triton(self, kernel, grid, args, meta):
            seen.append((kernel, args, meta))

        def cuda(self, name, grid, block, shared, args):
            pass

        def has_cuda(self, name):
            return False

    with launch.use_device(Recorder()):
        function(*args, **kwargs)
    return seen


@functools.cache
def _triton(arch):
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", arch, 32)
    return target, make_backend(target), create_function_from_signature


# Triton parses a kernel's Python by `ast`, which loses count of its depth in CPython 3.11 where several threads parse.
_PARSER = threading.Lock()


def _compile(kernel, signature, constexprs, attrs, arch, options) -> Sass:
    target = _triton(arch)[0]
    import triton
    from triton.compiler import ASTSource

    class OneAtATime(ASTSource):
        def make_ir(self, *args):
            with _PARSER:
                return super().make_ir(*args)

    binary = triton.compile(OneAtATime(kernel, signature, constexprs, attrs), target=target, options=options)
    with _cubin(binary.asm["cubin"]) as path:
        usage = _tool("cuobjdump", "-res-usage", path)
        text = _tool("nvdisasm", "-c", path)
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    # "/*0080*/  @!P0 LDG.E.128 R4, [R12.64] ;": the predicate is left out, NOPs that fill the last line too.
    opcodes = collections.Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)", text))
    del opcodes["NOP"]
    return Sass(
        arch, 32 * binary.metadata.num_warps, registers, binary.metadata.shared, stack, opcodes, text, binary.asm["ptx"]
    )


@contextlib.contextmanager
def _cubin(data):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.cubin")
        path.write_bytes(data)
        yield str(path)


def _tool(name, *args) -> str:
    import triton.backends.nvidia

    tool = pathlib.Path(triton.backends.nvidia.__path__[0], "bin", name)
    done = subprocess.run([str(tool), *args], capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"{name} failed: {done.stderr}")
    return done.stdout

"""What ptxas makes of a Triton kernel on sm_80, sm_90 and sm_100, found offline: no GPU, no launch.

    for kernel, args, meta in gate.launches(op, x, w):   # what the package's own launchers ask for
        sass = gate.inspect_launch(kernel, args, meta, arch=90)
        assert sass.spills == 0 and sass.count("HGMMA") and sass.count("LDG.128")

`inspect` takes a signature instead of arguments. The cubin comes from `triton.compile` and so from Triton's cache.
"""

import functools
import os
import threading
from dataclasses import dataclass

from ptxsim import sass
from ptxsim.sass import ARCHS, SHARED_BLOCK

__all__ = ["ARCHS", "SHARED_BLOCK", "Sass", "inspect", "inspect_launch", "launches"]


@dataclass(frozen=True)
class Sass(sass.Code):
    """One compiled kernel; shared: what a launch asks for, too."""

    threads: int
    ptx: str

    @property
    def blocks_per_sm(self) -> int:
        return self.blocks(self.threads, self.shared)


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
        def triton(self, kernel, grid, args, meta, reaches=()):
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
    (code,) = sass.read(binary.asm["cubin"], arch).values()
    of_launch = binary.metadata.shared, code.local, code.lines, 32 * binary.metadata.num_warps
    return Sass(arch, code.registers, code.stack, *of_launch, binary.asm["ptx"])

"""PTX from the two compilers, for sm_80 unless another is named: Triton kernels as its launcher would specialise them,
CUDA C++ through nvcc."""

import functools
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile
from dataclasses import dataclass

from .build import cache_folder


@dataclass(frozen=True)
class TritonBinary:
    ptx: str
    name: str
    shared: int
    threads: int
    passed: tuple[str, ...]  # parameters that are passed at the launch; the others became constants
    types: tuple[str, ...]  # of these
    compiled: object  # as Triton has it


@functools.cache
def _triton(capability: int):
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", capability, 32)
    return triton, ASTSource, target, make_backend(target), create_function_from_signature


_binaries: dict = {}


def compile_triton(kernel, *args, capability: int = 80, **meta) -> tuple[TritonBinary, dict]:
    """The binary Triton's own launcher would run for these arguments, and the arguments by name.

    Goes through Triton's binder, so constants, divisibility by 16 and integers equal to 1 are those of a real launch.
    """
    triton, source, target, backend, make_binder = _triton(capability)
    if not isinstance(kernel, triton.JITFunction):
        raise TypeError(f"kernel is {type(kernel).__name__}, want a JITFunction: pass what the wrapper wraps (.fn)")
    key = id(kernel), capability
    if key not in _binaries:
        _binaries[key] = (kernel, make_binder(kernel.signature, kernel.params, backend), {})
    _, binder, cache = _binaries[key]
    meta.setdefault("debug", False)
    bound, specialization, options = binder(*args, **meta)
    special = str(specialization) + str(sorted(options.items()))
    if special not in cache:
        chosen, signature, constexprs, attrs = kernel._pack_args(backend, meta, bound, specialization, options)
        binary = triton.compile(source(kernel, signature, constexprs, attrs), target=target, options=chosen.__dict__)
        passed = {n: t for n, t in signature.items() if t != "constexpr"}
        cache[special] = TritonBinary(
            *(binary.asm["ptx"], binary.metadata.name, binary.metadata.shared, 32 * binary.metadata.num_warps),
            *(tuple(passed), tuple(passed.values()), binary),
        )
    return cache[special], bound


TOOLKIT = "/usr/local/cuda"


def nvcc() -> str | None:
    """The compiler of the toolkit, or of PyPI's wheels."""
    found = shutil.which("nvcc")
    if found:
        return found
    for root in (os.environ.get("CUDA_HOME"), TOOLKIT):
        if root and os.access(f"{root}/bin/nvcc", os.X_OK):
            return f"{root}/bin/nvcc"
    try:
        import nvidia
    except ImportError:
        return None
    wheels = [p for base in nvidia.__path__ for p in pathlib.Path(base).glob("**/bin/nvcc")]
    return str(wheels[0]) if wheels else None


@functools.cache
def compile_cuda(source: str, *flags: str) -> str:
    """PTX of CUDA C++ text; cached by text, flags, compiler and the headers of the folders named by -I flags."""
    compiler = nvcc()
    if compiler is None:
        raise FileNotFoundError("no nvcc: install a CUDA toolkit or the nvidia-cuda-nvcc wheel")
    arch = [] if any(f.startswith("-arch") for f in flags) else ["-arch=sm_80"]
    command = [compiler, "-ptx", *arch, "-lineinfo", "-std=c++17", *flags]
    headers = [p.read_text() for f in flags if f.startswith("-I") for p in sorted(pathlib.Path(f[2:]).rglob("*.*h"))]
    digest = hashlib.sha256(
        "\0".join([source, *headers, *command, str(os.stat(compiler).st_mtime_ns)]).encode()
    ).hexdigest()[:24]
    cached = cache_folder() / f"cuda-{digest}.ptx"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            path = pathlib.Path(work, "kernel.cu")
            path.write_text(source)
            done = subprocess.run([*command, str(path), "-o", f"{work}/kernel.ptx"], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"nvcc failed:\n{done.stderr}")
            text = pathlib.Path(work, "kernel.ptx").read_text()
        partial = cached.with_suffix(f".{os.getpid()}")
        partial.write_text(text)
        os.replace(partial, cached)
    return cached.read_text()

"""The simulated device behind the package's launch seam: same Python, same launch geometry, same compiled kernel."""

import contextlib
import ctypes
import functools
import re

import torch

from resnet_fast.backends.launch import Compiled

from .compilers import compile_cuda, compile_triton
from .fresh import FreshTensors
from .sim import Kernel, Report


@functools.lru_cache(maxsize=512)
def _kernel(ptx: str, name: str) -> Kernel:
    """Lowered once a process, which takes a second for a large one: the devices of many tests share it."""
    return Kernel(ptx, name)


def _entry(ptx: str, part: str) -> str:
    """The kernel whose mangled name holds `part`."""
    names = [n for n in re.findall(r"\.entry\s+([\w$]+)", ptx) if part in n]
    if len(names) != 1:
        raise KeyError(f"{part!r} is in the names {names}, want one kernel")
    return names[0]


class SimulatedDevice:
    """Takes the launches of `resnet_fast.backends.launch`; `launches` keeps (kernel name, Report) of each."""

    def __init__(self, seed: int = 0, limit: int = 10**9, fresh: FreshTensors | None = None, find_cuda=None):
        """find_cuda: (source, flags, part of the mangled name) of a CUDA kernel that was not given by `add_cuda`, by
        its name at the launch, or None."""
        self.seed, self.limit, self.fresh, self.find_cuda = seed, limit, fresh, find_cuda
        self.launches: list[tuple[str, Report]] = []
        self._cuda: dict[str, tuple[str, str]] = {}  # PTX and the kernel's name in it

    def add_cuda(self, source: str, *names: str, flags=()) -> None:
        """Compiles CUDA C++ text (no torch headers; include the .cuh) and offers its extern "C" kernels by name."""
        ptx = compile_cuda(source, *flags)
        for name in names:
            if f".entry {name}(" not in ptx:
                raise KeyError(f'the CUDA source has no extern "C" kernel {name!r}')
            self._cuda[name] = ptx, name

    def has_cuda(self, name: str) -> bool:
        return name in self._cuda or (self.find_cuda is not None and self.find_cuda(name) is not None)

    def triton(self, kernel, grid, args, meta, reaches=()):
        binary, bound = compile_triton(kernel, *args, **meta)
        self._run(
            _kernel(binary.ptx, binary.name),
            grid(bound) if callable(grid) else grid,
            binary.threads,
            [bound[n] for n in binary.passed],
            binary.shared,
            binary.passed,
            reaches=reaches,
        )
        return binary

    def compiled_triton(self, binary):
        owner = (None, _kernel(binary.ptx, binary.name))
        return Compiled(0, True, binary.threads, binary.shared, binary.types, 0, owner), binary.passed

    def compiled_cuda(self, name, threads, shared, args):
        owner = (name, _kernel(*self._cuda[name]))
        return Compiled(0, False, threads, shared, ("i64",) * len(args), 0, owner)

    def replay(self, compiled, grid, parameters) -> None:
        """A launch of a tape: pointers come as addresses with the bytes that lie there."""
        name, kernel = compiled.owner
        sizes = [size for _, size in kernel.info["params"]]
        args = []
        for size, (data, extent) in zip(sizes, parameters, strict=False):
            if extent < 0:
                args.append(data[:size])
            else:
                memory = (ctypes.c_char * extent).from_address(int.from_bytes(data, "little"))
                args.append(torch.frombuffer(memory, dtype=torch.uint8) if extent else None)
        self._run(kernel, grid, compiled.threads, args, compiled.shared, name=name, reaches=compiled.reaches)

    def cuda(self, name, grid, block, shared, args) -> None:
        if name not in self._cuda:
            found = self.find_cuda(name) if self.find_cuda else None
            if found is None:
                raise KeyError(f"the simulated device has no CUDA kernel {name!r}: see add_cuda")
            source, flags, part = found
            ptx = compile_cuda(source, *flags)
            self._cuda[name] = ptx, _entry(ptx, part)
        self._run(_kernel(*self._cuda[name]), grid, block, args, shared, name=name)

    def _run(self, kernel, grid, block, args, shared, names=(), name=None, reaches=()) -> None:
        init = {}
        if self.fresh:
            maps = {k: self.fresh.bytes_of(a) for k, a in enumerate(args) if isinstance(a, torch.Tensor)}
            init = {k: m for k, m in maps.items() if m is not None}
        report = kernel.launch(
            grid,
            block,
            *args,
            shared=shared,
            names=names,
            init=init,
            reaches=reaches,
            seed=self.seed + len(self.launches),
            limit=self.limit,
        )
        self.launches.append((name or kernel.name, report))


@contextlib.contextmanager
def simulated(**options):
    """While open, the package's operators take their GPU path on CPU tensors, and its launches run in the simulator."""
    from resnet_fast.backends import launch
    from resnet_fast.gpu.register import KERNELS

    with FreshTensors({"resnet_fast": KERNELS}) as fresh:
        device = SimulatedDevice(fresh=fresh, **options)
        with launch.use_device(device):
            yield device

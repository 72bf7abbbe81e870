"""The one place where GPU kernels are launched.

Ops call `launch` for Triton kernels and `cuda_launch` for the CUDA kernels of the extension. Both go through
`device()`, which a test replaces by a simulator (`use_device`), so that the same Python runs with the same geometry
on machines without a GPU. Geometry comes from pure functions of shapes; this module decides nothing. Triton is
imported by whoever defines the kernels, never here.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

# Starts a CUDA kernel on the current stream: grid, block, bytes of shared memory, arguments.
Launcher = Callable[[tuple[int, ...], tuple[int, ...], int, tuple[Any, ...]], None]
Grid = Sequence[int] | Callable[[dict[str, Any]], Sequence[int]]


class Device(Protocol):
    """What can run a kernel. A launch is asynchronous on the current stream, as far as the caller can tell."""

    def triton(self, kernel: Any, grid: Grid, args: Sequence[Any], meta: dict[str, Any]) -> None: ...

    def cuda(self, name: str, grid: Sequence[int], block: Sequence[int], shared: int, args: Sequence[Any]) -> None: ...

    def has_cuda(self, name: str) -> bool: ...


class GpuDevice:
    """The current CUDA device: Triton's own launcher, and the extension's registered launchers."""

    def __init__(self) -> None:
        self._launchers: dict[str, Launcher] = {}

    def register(self, name: str, launcher: Launcher) -> None:
        """`launcher(grid, block, shared, args)` starts the CUDA kernel `name` on the current stream."""
        self._launchers[name] = launcher

    def has_cuda(self, name: str) -> bool:
        return name in self._launchers

    def triton(self, kernel: Any, grid: Grid, args: Sequence[Any], meta: dict[str, Any]) -> None:
        if _this_thread.compiles_only:
            kernel.warmup(*args, grid=grid, **meta)
            return
        with _guard(args):
            kernel[grid](*args, **meta)

    def cuda(self, name: str, grid: Sequence[int], block: Sequence[int], shared: int, args: Sequence[Any]) -> None:
        if _this_thread.compiles_only:
            return
        try:
            launcher = self._launchers[name]
        except KeyError:
            raise RuntimeError(f"resnet_fast was built without the CUDA kernel {name!r}") from None
        with _guard(args):
            launcher(tuple(grid), tuple(block), shared, tuple(args))


class _ThisThread(threading.local):
    compiles_only = False


_this_thread = _ThisThread()


@contextlib.contextmanager
def compile_only() -> Iterator[None]:
    """While open, this thread's launches compile Triton kernels and start nothing: tensors may be on "meta"."""
    before, _this_thread.compiles_only = _this_thread.compiles_only, True
    try:
        yield
    finally:
        _this_thread.compiles_only = before


gpu = GpuDevice()
# Process-wide, a plain global: torch.compile can guard on it.
_device: Device = gpu


def device() -> Device:
    """Where launches go now."""
    return _device


def is_simulated() -> bool:
    """True while something other than the GPU stands behind the seam: CPU tensors may then take the GPU path."""
    return _device is not gpu


@contextlib.contextmanager
def use_device(replacement: Device) -> Iterator[Device]:
    """Sends all launches of the process to `replacement` while open."""
    global _device
    before, _device = _device, replacement
    try:
        yield replacement
    finally:
        _device = before


def launch(kernel: Any, grid: Grid, args: Sequence[Any], **meta: Any) -> None:
    """Launches the Triton kernel `kernel[grid](*args, **meta)`.

    grid: up to three integers, or a function of the bound arguments as Triton takes it. meta: constexprs, num_warps,
    num_stages. A grid with a zero is an empty launch and returns at once.
    """
    if not callable(grid) and 0 in tuple(grid):
        return
    # Products and sums may fuse, as in the C++ kernels; Triton's default for it changes from release to release.
    meta.setdefault("enable_fp_fusion", True)
    device().triton(kernel, grid, args, meta)


def cuda_launch(name: str, grid: Sequence[int], block: Sequence[int], shared: int, args: Sequence[Any]) -> None:
    """Launches the precompiled CUDA kernel `name`; shared is its dynamic shared memory in bytes.

    args: tensors, numbers, None for a null pointer, bytes for a struct passed by value.
    """
    if 0 in tuple(grid):
        return
    device().cuda(name, grid, block, shared, args)


def has_cuda(name: str) -> bool:
    """Whether the device behind the launches has the CUDA kernel `name`."""
    return device().has_cuda(name)


def _guard(args: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """Makes the device of the first CUDA tensor current for a launch."""
    for a in args:
        index = getattr(getattr(a, "device", None), "index", None)
        if index is not None and a.is_cuda:
            import torch

            return torch.cuda.device(index)
    return contextlib.nullcontext()

"""The launch seam: every GPU kernel that Python launches goes through here.

Operators call `launch` for Triton kernels and `cuda_launch` for the CUDA kernels of the extension. Both go through
`device()`, which tests replace by a simulator (`use_device`): the same Python with the same launch geometry then runs
without a GPU. Geometry comes from pure functions of shapes elsewhere. This module does not import Triton.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

# Starts a CUDA kernel on the current stream: grid, block, bytes of shared memory, arguments.
Launcher = Callable[[tuple[int, ...], tuple[int, ...], int, tuple[Any, ...]], None]
Grid = Sequence[int] | Callable[[dict[str, Any]], Sequence[int]]


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel, as a recorder of launches needs it."""

    function: int  # address of the CUfunction, or of the extension's kernel
    by_driver: bool  # whether it is a CUfunction of the driver API
    threads: int
    shared: int
    parameters: tuple[str, ...]  # types of the parameters, in Triton's names
    scratch_pointers: int  # unused pointer parameters after these
    owner: Any  # keeps the function alive
    reaches: Sequence[Any] = ()  # tensors whose addresses it finds in memory


Replay = Callable[[Compiled, Sequence[int], Sequence[tuple[bytes, int]]], None] | Literal[False] | None


class Device(Protocol):
    """Runs kernels: the GPU or a simulator. To the caller a launch is asynchronous, on the current stream."""

    # Called for each launch of a tape, as (kernel, grid, [(bytes, extent or -1) a parameter]). None: tapes launch on
    # the GPU. False: tapes launch nothing.
    replay: Replay

    def triton(
        self, kernel: Any, grid: Grid, args: Sequence[Any], meta: dict[str, Any], reaches: Sequence[Any] = ()
    ) -> Any:
        """Launches a Triton kernel; returns the argument of :meth:`compiled_triton`."""

    def cuda(self, name: str, grid: Sequence[int], block: Sequence[int], shared: int, args: Sequence[Any]) -> None: ...

    def has_cuda(self, name: str) -> bool: ...

    def compiled_triton(self, ran: Any) -> tuple[Compiled, tuple[str, ...]]:
        """The compiled kernel, and the names of its parameters."""

    def compiled_cuda(self, name: str, threads: int, shared: int, args: Sequence[Any]) -> Compiled: ...


class GpuDevice:
    """The current CUDA device, by Triton's launcher and the launchers that the extension registers."""

    replay: Replay = None

    def __init__(self) -> None:
        self._registered: dict[str, Launcher] = {}
        self._fill: Callable[[], None] | None = None
        self._filling = threading.RLock()

    def register(self, name: str, launcher: Launcher) -> None:
        """`launcher(grid, block, shared, args)` starts the CUDA kernel `name` on the current stream."""
        self._registered[name] = launcher

    def register_when_asked(self, fill: Callable[[], None]) -> None:
        """`fill()` registers launchers, before the first kernel is looked up."""
        self._fill = fill

    def _launchers(self) -> dict[str, Launcher]:
        if self._fill is not None:
            with self._filling:
                if self._fill is not None:
                    self._fill()
                    self._fill = None
        return self._registered

    def has_cuda(self, name: str) -> bool:
        return name in self._launchers()

    def triton(
        self, kernel: Any, grid: Grid, args: Sequence[Any], meta: dict[str, Any], reaches: Sequence[Any] = ()
    ) -> Any:
        if _this_thread.compiles_only:
            return kernel.warmup(*args, grid=grid, **meta)
        with _guard(args):
            return kernel[grid](*args, **meta)

    def compiled_triton(self, ran: Any) -> tuple[Compiled, tuple[str, ...]]:
        passed = {name: kind for name, kind in ran.src.signature.items() if kind != "constexpr"}
        # Pointers to scratch memory follow the arguments; how many depends on Triton's release.
        entry = ran.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
        if ran.metadata.global_scratch_size or getattr(ran.metadata, "profile_scratch_size", 0):
            raise RuntimeError(f"{ran.metadata.name} wants scratch memory")
        found = Compiled(
            *(ran.function, True, 32 * ran.metadata.num_warps, ran.metadata.shared, tuple(passed.values())),
            scratch_pointers=entry.count(".param") - len(passed),
            owner=ran,
        )
        return found, tuple(passed)

    def compiled_cuda(self, name: str, threads: int, shared: int, args: Sequence[Any]) -> Compiled:
        from .native import extension  # tests run this file alone

        return Compiled(extension.kernel(name), False, threads, shared, ("i64",) * len(args), 0, None)

    def cuda(self, name: str, grid: Sequence[int], block: Sequence[int], shared: int, args: Sequence[Any]) -> None:
        if _this_thread.compiles_only:
            return
        try:
            launcher = self._launchers()[name]
        except KeyError:
            raise RuntimeError(f"resnet_fast was built without the CUDA kernel {name!r}") from None
        with _guard(args):
            launcher(tuple(grid), tuple(block), shared, tuple(args))


class _ThisThread(threading.local):
    compiles_only = False
    recorder: Any = None


_this_thread = _ThisThread()


@contextlib.contextmanager
def compile_only() -> Iterator[None]:
    """Context manager: this thread's launches compile Triton kernels and run nothing; tensors may be on "meta"."""
    before, _this_thread.compiles_only = _this_thread.compiles_only, True
    try:
        yield
    finally:
        _this_thread.compiles_only = before


def record(recorder: Any) -> None:
    """Calls ``recorder.launched`` for each launch of this thread from now on; None stops it."""
    _this_thread.recorder = recorder


def recording() -> bool:
    """Whether this thread's launches are being recorded."""
    return _this_thread.recorder is not None


def unrecorded() -> contextlib.AbstractContextManager[Any]:
    """Context manager: nothing that this thread does is recorded."""
    recorder = _this_thread.recorder
    return contextlib.nullcontext() if recorder is None else recorder.pause()


gpu = GpuDevice()
# Process-wide, a plain global: torch.compile can guard on it.
_device: Device = gpu


def device() -> Device:
    """The device that launches go to."""
    return _device


def is_simulated() -> bool:
    """Whether a simulator takes the launches: CPU tensors then take the GPU path."""
    return _device is not gpu


@contextlib.contextmanager
def use_device(replacement: Device) -> Iterator[Device]:
    """Context manager: all launches of the process go to `replacement`."""
    global _device
    before, _device = _device, replacement
    try:
        yield replacement
    finally:
        _device = before


def launch(kernel: Any, grid: Grid, args: Sequence[Any], *, reaches: Sequence[Any] = (), **meta: Any) -> None:
    """Launches the Triton kernel `kernel[grid](*args, **meta)`.

    grid: up to three integers, or a function of the bound arguments, as in Triton; with a zero in it nothing is
    launched. reaches: tensors that the kernel reaches by addresses in memory. meta: constexprs, num_warps, num_stages.
    """
    if not callable(grid) and 0 in tuple(grid):
        return
    # Allow fused multiply-add, as in the C++ kernels; Triton's default changes from release to release.
    meta.setdefault("enable_fp_fusion", True)
    ran = device().triton(kernel, grid, args, meta, reaches)
    if _this_thread.recorder is not None:
        compiled, passed = device().compiled_triton(ran)
        bound = dict(zip(kernel.arg_names, args, strict=False)) | meta
        values = [bound[n] for n in passed]
        compiled = replace(compiled, reaches=tuple(reaches))
        _this_thread.recorder.launched(compiled, grid(bound) if callable(grid) else grid, values)


def cuda_launch(name: str, grid: Sequence[int], block: Sequence[int], shared: int, args: Sequence[Any]) -> None:
    """Launches the precompiled CUDA kernel `name` with `shared` bytes of dynamic shared memory.

    args: tensors, numbers, None for a null pointer, bytes for a struct passed by value.
    """
    if 0 in tuple(grid):
        return
    device().cuda(name, grid, block, shared, args)
    if _this_thread.recorder is not None:
        compiled = device().compiled_cuda(name, block[0], shared, args)
        _this_thread.recorder.launched(compiled, grid, args)


def has_cuda(name: str) -> bool:
    """Whether the device that launches go to has the CUDA kernel `name`."""
    return device().has_cuda(name)


def _guard(args: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """Context manager: the device of the first CUDA tensor is current."""
    for a in args:
        index = getattr(getattr(a, "device", None), "index", None)
        if index is not None and a.is_cuda:
            import torch

            return torch.cuda.device(index)
    return contextlib.nullcontext()


def aligned(t: Any) -> Any:
    """``t``, or a copy if it is not aligned to 16 bytes, which kernels load at a time."""
    return t if t.data_ptr() % 16 == 0 else t.clone()

"""Which backends can run the fused operators here, which one is selected, and what fell back to PyTorch.

>>> resnet_fast.backends.status()
{'cpu': 'loaded, avx2', 'cuda': 'compiled, but no CUDA device is visible', 'triton': 'no CUDA device is visible'}
>>> with resnet_fast.backends.use("eager"):
...     model(x)
>>> resnet_fast.backends.fallbacks()
{'Block: training mode': 16}
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from typing import Final, Literal

import torch
from torch.autograd import forward_ad

from . import launch
from .native import missing as _missing

__all__ = ["cpu", "cuda", "fallbacks", "isa", "status", "training", "use"]

Name = Literal["auto", "eager", "cpu", "cuda", "triton"]
NAMES: Final = ("auto", "eager", "cpu", "cuda", "triton")

if _missing is not None:
    warnings.warn(f"resnet_fast runs without its kernels, on PyTorch's own operators: {_missing}", stacklevel=2)

# Asked once, because the compiler cannot trace the operator.
_isa: Final = ("baseline", "avx2", "avx512")[torch.ops.resnet_fast.cpu_isa() if _missing is None else 0]

_bf16_products: Final = _missing is None and torch.ops.resnet_fast.cpu_multiplies_bf16()

# Process-wide, like the switches of torch.backends; a plain global, so that torch.compile can guard on it.
_selected: Name = "auto"
_fallbacks: Counter[str] = Counter()


class _Cpu:
    """Switches of the CPU kernels."""

    allow_winograd: bool = True
    """Allows Winograd convolutions in float32 and bfloat16, as ``torch.backends.cudnn.allow_tf32`` allows TF32: a
    convolution errs at most 3 times as much as PyTorch's own (rms). ``False``: direct convolutions only.

    Winograd spreads a NaN further than the filter's window. In eval mode a chain that meets NaN or infinity is computed
    again without Winograd; in training mode and in programs of ``torch.compile`` and ``torch.export`` it is not. Set
    ``False`` where that matters."""

    allow_bf16_products: bool = True
    """Allows bfloat16 multiply-accumulate with float32 accumulators, filters rounded to bfloat16, as in PyTorch, where
    the CPU has the instructions (AVX512_BF16). ``False``, and on other CPUs: bfloat16 is computed in float32."""

    _keep_memory: bool = True

    @property
    def keep_memory(self) -> bool:
        """Caches freed blocks of 1 MiB or more (activations, gradients, scratch) for later allocations: the C library
        would return them to the system and fault them in again, page by page. Memory in use and cached together stays
        within 1.5 times the peak in use; a block is freed once 4096 later ones have come back. ``False`` frees the
        cache and allocates from PyTorch's own allocator from then on, which its profiler sees."""
        return self._keep_memory

    @keep_memory.setter
    def keep_memory(self, keep: bool) -> None:
        self._keep_memory = bool(keep)
        if _missing is None:
            torch.ops.resnet_fast.keep_memory(self._keep_memory)

    def kept_bytes(self) -> int:
        """Bytes cached and not in use."""
        return torch.ops.resnet_fast.kept_memory()[0] if _missing is None else 0


cpu = _Cpu()


class _Cuda:
    """Switches of the GPU path."""

    replay: bool = True
    """Records the launches of a chain at its second call with inputs of a kind, and replays them from C++ at later
    calls: launching a layer from Python takes several times as long as the GPU runs it. ``False``: never."""

    check_weights: bool = True
    """In inference, compares a sample of every weight and buffer on the device at the head of each chain, and packs
    anew there what has changed: one launch a chain, at which the host waits for nothing, in tapes and CUDA graphs, too.
    It sees what PyTorch does not count (``docs/limits.md``). Wants Triton, and runs whichever backend is selected.
    ``False``: only changes that PyTorch counts are seen."""


cuda = _Cuda()


class _Training:
    """Switches of fused training."""

    recompute_outputs: bool = False
    """``True``: residual sums are not saved for the backward but recomputed there, by one elementwise pass a block. A
    third less memory is saved; results are the same bit for bit."""


training = _Training()


def loaded() -> bool:
    """Whether the extension, and with it every operator of ``torch.ops.resnet_fast``, is loaded."""
    return _missing is None


def selected() -> Name:
    """The name given to :func:`use`; ``"auto"`` outside of it."""
    return _selected


def isa() -> str:
    """The instruction set of the CPU kernels, which honours ``ATEN_CPU_CAPABILITY``: avx512, avx2 or baseline."""
    if _missing is not None:
        raise RuntimeError(_missing)
    return _isa


def bf16_products() -> bool:
    """Whether bfloat16 is multiplied in bfloat16: this CPU has AVX512_BF16, and ``cpu.allow_bf16_products`` is on."""
    return _bf16_products and cpu.allow_bf16_products


# (operator, device) pairs with a kernel; resnet_fast.ops and resnet_fast.gpu fill it. A plain set, which the compiler
# can trace, unlike the dispatcher.
_kernels: set[tuple[str, str]] = set()
_KEYS: Final = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta"}


def note_kernel(op: str) -> None:
    """Looks up which devices have a kernel of ``torch.ops.resnet_fast.<op>``."""
    for device, key in _KEYS.items():
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"resnet_fast::{op}", key):
            _kernels.add((op, device))


def has_kernel(op: str, device: str) -> bool:
    """Whether ``torch.ops.resnet_fast.<op>`` runs on ``device``: ``"cpu"``, ``"cuda"`` or, for shapes, ``"meta"``."""
    return (op, device) in _kernels


def triton_version() -> str:
    """The version of the installed Triton, or "none"; without importing it, which takes a second."""
    return metadata.version("triton") if has_triton() else "none"


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def has_cuda_convolution() -> bool:
    """Whether the extension was built with the CUDA C++ convolutions."""
    return has_kernel("conv_bn_relu_launch", "cuda")


def kind(t: torch.Tensor) -> str:
    """The device type whose kernels run on ``t``: its own, or ``"cuda"`` while a simulator takes the launches."""
    return "cuda" if launch.is_simulated() else t.device.type


def unfused_reason(op: str, device: str) -> str | None:
    """Why ``op`` does not run fused on ``device``, or None."""
    if _selected == "eager":
        return "backends.use('eager')"
    if _missing is not None:
        return "the extension is not loaded"
    if not has_kernel(op, device):
        needs_triton = op == "conv_bn_stats" and device == "cuda" and not has_triton()
        return "no training without Triton: pip install triton" if needs_triton else f"no kernel for {device} tensors"
    if _selected == "cpu" and device != "cpu":
        return f"{device} tensors"
    if _selected in ("cuda", "triton") and device != "cuda":
        return f"{device} tensors"
    if _selected == "cuda" and op == "conv_bn_stats":
        return "no training in CUDA C++: backends.use('triton') has it"
    if _selected == "cuda" and op != "add_relu" and not has_cuda_convolution():
        return "no kernel in CUDA C++ was compiled: backends.use('triton') has one"
    return None


def transform_reason() -> str | None:
    """Why nothing may run fused now, or None: kernels propagate no tangents and cannot read a transform's tensors."""
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform"
    return None


def status() -> dict[str, str]:
    """For each backend, ``"loaded, ..."`` or why it cannot run."""
    return {"cpu": _cpu_status(), "cuda": _cuda_status(), "triton": _triton_status()}


def _cpu_status() -> str:
    if _missing is not None:
        return _missing
    return f"loaded, {isa()} with bfloat16 products" if _bf16_products else f"loaded, {isa()}"


def _cuda_status() -> str:
    if _missing is not None:
        return _missing
    if not has_cuda_convolution():
        return "not compiled: no nvcc was found when resnet_fast was built"
    if not torch.cuda.is_available() and not launch.is_simulated():
        return "compiled, but no CUDA device is visible"
    return "loaded" if has_triton() else "loaded, but training and check_weights need Triton, too: pip install triton"


def _triton_status() -> str:
    if _missing is not None:
        return _missing
    if not has_triton():
        return "not installed: pip install triton"
    if not torch.cuda.is_available() and not launch.is_simulated():
        return "no CUDA device is visible"
    return "loaded"


@contextmanager
def use(name: Name) -> Iterator[None]:
    """Context manager: ``"eager"`` runs plain PyTorch, ``"auto"`` the best backend, another name that backend alone.

    A call that the named backend cannot run raises and says why; it does not fall back. The selection is process-wide:
    other threads see it, too.

    Raises:
        ValueError: ``name`` is not a backend.
        RuntimeError: the backend cannot run here; the message says why.
    """
    global _selected
    if name not in NAMES:
        raise ValueError(f"name is {name!r}, want one of {', '.join(NAMES)}")
    if name not in ("auto", "eager") and not status()[name].startswith("loaded"):
        raise RuntimeError(f"backend {name!r} cannot run: {status()[name]}")
    before, _selected = _selected, name
    try:
        yield
    finally:
        _selected = before


def decline(what: str, reason: str) -> None:
    """Counts that ``what`` falls back to PyTorch's own operators for ``reason``; raises where a backend was named."""
    if _selected not in ("auto", "eager"):
        raise RuntimeError(f"backends.use({_selected!r}): {what} cannot run fused: {reason}")
    if not torch.compiler.is_compiling():
        _fallbacks[f"{what}: {reason}"] += 1


def fallbacks(*, clear: bool = False) -> dict[str, int]:
    """How many calls fell back, by ``"what: reason"``; calls inside compiled programs are not counted."""
    counts = dict(_fallbacks)
    if clear:
        _fallbacks.clear()
    return counts

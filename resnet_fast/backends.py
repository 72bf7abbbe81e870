"""What can run the fused operators here, what was chosen, and why not more.

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

# Asked once: the compiler cannot look into the operator.
_isa: Final = ("baseline", "avx2", "avx512")[torch.ops.resnet_fast.cpu_isa() if _missing is None else 0]

_bf16_products: Final = _missing is None and torch.ops.resnet_fast.cpu_multiplies_bf16()

# Process-wide, as torch.backends' switches are: a plain global, so that torch.compile can guard on it.
_selected: Name = "auto"
_fallbacks: Counter[str] = Counter()


class _Cpu:
    """Switches of the CPU kernels."""

    allow_winograd: bool = True
    """Winograd convolutions for float32 and bfloat16 blocks, as ``torch.backends.cudnn.allow_tf32`` allows TF32: a
    convolution stays within 3 x the rms error of PyTorch's own. ``False`` keeps to direct convolutions.

    In eval mode a chain of layers that meets NaN or infinity is computed again without them, as they carry a NaN
    further than a filter's window. Not so in training mode, and within programs that ``torch.compile`` or
    ``torch.export`` made: where that matters, say ``False``."""

    allow_bf16_products: bool = True
    """bfloat16 images are multiplied in bfloat16 and added up in float32, filters rounded to bfloat16, as PyTorch does,
    where the CPU has instructions for it (AVX512_BF16). ``False``, and on other CPUs: computed in float32."""

    _keep_memory: bool = True

    @property
    def keep_memory(self) -> bool:
        """Memory of maps, gradients and scratch, in blocks of 1 MiB or more, is kept for the next ones when tensors go:
        the C library would give it back to the system and get it again page by page. Used and kept memory together stay
        within 1.5 x the most that was in use at once; blocks that 4096 others came after are given back.
        ``False`` gives all of it back, and takes memory from PyTorch's own allocator from then on, which its profiler
        sees."""
        return self._keep_memory

    @keep_memory.setter
    def keep_memory(self, keep: bool) -> None:
        self._keep_memory = bool(keep)
        if _missing is None:
            torch.ops.resnet_fast.keep_memory(self._keep_memory)

    def kept_bytes(self) -> int:
        """Bytes that are kept and not in use."""
        return torch.ops.resnet_fast.kept_memory()[0] if _missing is None else 0


cpu = _Cpu()


class _Cuda:
    """Switches of the GPU path."""

    replay: bool = True
    """Chains of convolutions are launched from C++ from their third call with inputs of a kind on, as the second one
    was: what Python takes for a layer is several times what the GPU does. ``False`` launches from Python, always."""


cuda = _Cuda()


class _Training:
    """Switches of fused training."""

    recompute_outputs: bool = False
    """``True``: the sums that residual blocks give are not kept for the backward pass but formed again there, by a pass
    over memory for each block and no convolution. A third less is kept; the results are the same bit for bit."""


training = _Training()


def loaded() -> bool:
    """Whether the extension, and with it every operator of ``torch.ops.resnet_fast``, is there."""
    return _missing is None


def selected() -> Name:
    """The name given to :func:`use`, ``"auto"`` outside of it."""
    return _selected


def isa() -> str:
    """Instruction set of the CPU kernels under ``ATEN_CPU_CAPABILITY``: ``"avx512"``, ``"avx2"`` or ``"baseline"``."""
    if _missing is not None:
        raise RuntimeError(_missing)
    return _isa


def bf16_products() -> bool:
    """Whether bfloat16 images are multiplied in bfloat16 on this CPU: it has AVX512_BF16, and no switch forbids it."""
    return _bf16_products and cpu.allow_bf16_products


# Operators and the devices that have a kernel of them; resnet_fast.ops fills it once all are registered. A plain set:
# the compiler can look into it, but not into the dispatcher.
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
    """Of the Triton that is installed, "none" without one; known without the second that importing it takes."""
    return metadata.version("triton") if has_triton() else "none"


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def has_cuda_convolution() -> bool:
    """Whether the extension holds the convolutions in CUDA C++."""
    return has_kernel("conv_bn_relu_launch", "cuda")


def kind(t: torch.Tensor) -> str:
    """The device whose kernels ``t`` takes: its own, or ``"cuda"`` while a simulated GPU stands behind the launches."""
    return "cuda" if launch.is_simulated() else t.device.type


def unfused_reason(op: str, device: str) -> str | None:
    """Why ``op`` does not run fused on ``device``, or None."""
    if _selected == "eager":
        return "backends.use('eager')"
    if _missing is not None:
        return "the extension is not loaded"
    if not has_kernel(op, device):
        needs_triton = op == "conv_moments" and device == "cuda" and not has_triton()
        return "no training without Triton: pip install triton" if needs_triton else f"no kernel for {device} tensors"
    if _selected == "cpu" and device != "cpu":
        return f"{device} tensors"
    if _selected in ("cuda", "triton") and device != "cuda":
        return f"{device} tensors"
    if _selected == "cuda" and op == "conv_moments":
        return "no training in CUDA C++: backends.use('triton') has it"
    if _selected == "cuda" and op != "add_relu" and not has_cuda_convolution():
        return "no kernel in CUDA C++ was compiled: backends.use('triton') has one"
    return None


def transform_reason() -> str | None:
    """Why nothing may run fused now: the kernels carry no tangents and cannot look into the tensors of a transform."""
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform"
    return None


def status() -> dict[str, str]:
    """For each backend ``"loaded, ..."``, or why it is not in use."""
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
    return "loaded" if has_triton() else "loaded, but training needs Triton, too: pip install triton"


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
    """Within the block, run ``"eager"`` PyTorch or insist on one backend; ``"auto"`` takes the best that can run.

    Where a backend was named, what it cannot run raises and says why, instead of falling back. The choice is
    process-wide: threads started outside see it, too.

    Raises:
        ValueError: ``name`` is not a backend.
        RuntimeError: that backend is not in use here, with the reason.
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
    """Notes that ``what`` runs on PyTorch's own operators for ``reason``; raises where a backend was named."""
    if _selected not in ("auto", "eager"):
        raise RuntimeError(f"backends.use({_selected!r}): {what} cannot run fused: {reason}")
    if not torch.compiler.is_compiling():
        _fallbacks[f"{what}: {reason}"] += 1


def fallbacks(*, clear: bool = False) -> dict[str, int]:
    """How often something ran unfused, by ``"what: reason"``; calls inside compiled programs are not counted."""
    counts = dict(_fallbacks)
    if clear:
        _fallbacks.clear()
    return counts

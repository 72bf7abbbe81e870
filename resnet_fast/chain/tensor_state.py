"""What a staleness guard compares of a tensor: its memory, geometry and version, and a sample of its contents."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import TensorBase
from torch.utils import swap_tensors

from ..backends.native import extension

__all__ = ["has_version", "is_strided", "of", "samples"]

_LINE = 64  # bytes of a cache line


def has_version(t: Tensor) -> bool:
    """Whether PyTorch counts changes of ``t``: not those of tensors made in inference mode."""
    try:
        return t._version >= 0
    except RuntimeError:
        return False


def is_strided(t: Tensor) -> bool:
    """Whether ``t`` has an address and strides."""
    return t.layout == torch.strided and not t.is_nested


def of(t: Tensor) -> bytes | None:
    """Where C++ finds memory, version, sizes and strides of ``t`` again, and what they are; None: ask the getters."""
    if type(t) not in (Tensor, nn.Parameter) or not is_strided(t) or not has_version(t) or not _is_reliable():
        return None
    state: bytes | None = extension.tensor_state(t, *_description(t))
    return state


def _description(t: Tensor) -> tuple[int, int, int, int]:
    return t._cdata, TensorBase.__basicsize__, t.data_ptr(), t._version


@functools.cache
def _is_reliable() -> bool:
    """Whether, in this release of PyTorch, C++ sees a write, new memory and a swap of tensors.

    Tried in a thread of its own, which the caller's modes and transforms (FakeTensorMode, torch.func) do not reach.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_try).result()


def _try() -> bool:
    def is_seen(change: Callable[[Tensor], Any]) -> bool:
        t = nn.Parameter(torch.zeros(1, device="cpu"))
        before = _description(t)
        was = extension.tensor_state(t, *before)
        change(t)
        old, new = (extension.tensor_state(t, *described) for described in (before, _description(t)))
        return was is not None and old is None and new is not None

    with torch.no_grad():
        other = nn.Parameter(torch.zeros(1, device="cpu"))
        write, move, swap = Tensor.zero_, lambda t: setattr(t, "data", other.data), lambda t: swap_tensors(t, other)
        return is_seen(write) and is_seen(move) and is_seen(swap)


def samples(extents: Sequence[tuple[int, int]]) -> bytes:
    """Copies from memory, given as addresses and bytes: of whole cache lines, then of what is behind the last one."""
    lines = [line for extent in extents for line in _lines(*extent)]
    words = array("Q", [len(lines)])
    for line in lines:
        words.append(line)
        words.frombytes(ctypes.string_at(line, _LINE))
    rests = [(start + n - n % _LINE, n % _LINE) for start, n in extents if n < 8 * _LINE and n % _LINE]
    words.append(len(rests))
    for start, n in rests:
        words.extend((start, n))
        words.frombytes(ctypes.string_at(start, n).ljust(_LINE, b"\0"))
    return words.tobytes()


def _lines(start: int, count: int) -> Iterable[int]:
    """Addresses of the whole cache lines of a small tensor, or of eight of a large one, evenly spread from its first
    byte to its last. More would take longer than the kernels of a small network."""
    if count <= 8 * _LINE:
        return range(start, start + count // _LINE * _LINE, _LINE)
    end = start + count
    return (*(start + count // 7 * i // _LINE * _LINE for i in range(7)), end - _LINE)  # a tensor starts on a line

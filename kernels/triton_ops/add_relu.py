"""add_relu on NVIDIA GPUs: one flat pass over two tensors of one layout."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fast import launch

from .tiles import cdiv

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# 128 threads with two 16-byte vectors of each input: 8 KB in flight a block, 16 blocks an SM. Small blocks end one by
# one and are replaced at once, so the memory never waits for the slowest of a large one.
WARPS = 4
BLOCK_BYTES = 32 * WARPS * 2 * 16


@triton.jit
def _add_relu_fwd_kernel(a, b, out, n, BLOCK: tl.constexpr):
    # The block's offset is 64-bit and scalar; those within the block are small. Whole blocks are not masked: a mask of
    # an odd n would split the vectors of all of them.
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    if first + BLOCK <= n:
        _add_relu_block(a + first, b + first, out + first, i, None)
    else:
        _add_relu_block(a + first, b + first, out + first, i, i < n - first)


@triton.jit
def _add_relu_block(a, b, out, i, mask):
    s = tl.load(a + i, mask) + tl.load(b + i, mask)
    # NaN is not less than zero, so it stays, as torch keeps it. (tl.maximum drops it.)
    tl.store(out + i, tl.where(s < 0, 0.0, s).to(out.dtype.element_ty), mask)


def geometry(n: int, itemsize: int) -> tuple[tuple[int], int]:
    """The grid and the elements of a block."""
    block = BLOCK_BYTES // itemsize
    return (cdiv(n, block),), block


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    """``relu(a + b)``, equivalent to ``F.relu(a + b)``. Reads a and b once and writes the result once.

    a: any shape; float16, bfloat16, float32, float64. b: of the same shape, dtype and device.
    The result has a's layout; NaN and the sign of zero are kept. A tensor that is not dense, or a b of another layout,
    is copied first. Raises TypeError and ValueError.
    """
    _check_tensor("a", a, DTYPES)
    _check_tensor("b", b, (a.dtype,), like=a)
    out = torch.empty_like(a)
    grid, block = geometry(a.numel(), a.dtype.itemsize)
    args = (_laid_out_as(out, a), _laid_out_as(out, b), out, a.numel())
    launch.launch(_add_relu_fwd_kernel, grid, args, BLOCK=block, num_warps=WARPS)
    return out


def _check_tensor(name: str, t: Tensor, dtypes: Sequence[torch.dtype], like: Tensor | None = None) -> None:
    """Raises TypeError or ValueError that names the argument, what it got and what it wants.

    like: whose device and shape the tensor has to share; without one, it has to be where kernels run.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is {type(t).__name__}, want a tensor")
    if like is None and not t.is_cuda and not launch.is_simulated():
        raise ValueError(f"{name} is on {t.device}, want a CUDA device")
    if like is not None and t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, want {like.device}")
    if t.dtype not in dtypes:
        raise TypeError(f"{name} is {t.dtype}, want {' or '.join(map(str, dtypes))}")
    if like is not None and t.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}, want {tuple(like.shape)}")


def _laid_out_as(pattern: Tensor, t: Tensor) -> Tensor:
    """`t` itself where its elements lie in the order of `pattern`'s, which is dense; else a copy that does."""
    same = all(s == p for s, p, n in zip(t.stride(), pattern.stride(), t.shape, strict=True) if n > 1)
    return t if same else torch.empty_like(pattern).copy_(t)

"""The second step of sums over pixels on NVIDIA GPUs: partial results of blocks, added in fixed order in float64."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fast import launch

from .tiles import FINAL_C, FINAL_P, WARPS, final_grid


@triton.jit(do_not_specialize=["C", "parts"])
def _sums_final_kernel(partial, sums, C, parts, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Row r of [3, C] is the sum over parts of row r of theirs; rows that nobody asked for are zero."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    for row in tl.static_range(3):
        total = tl.zeros((BLOCK_P, BLOCK_C), tl.float64)
        if row < ROWS:
            for start in range(0, parts, BLOCK_P):
                inside = (start + p < parts)[:, None] & (c < C)[None, :]
                offsets = (start + p)[:, None].to(tl.int64) * (ROWS * C) + (row * C + c)[None, :]
                total += tl.load(partial + offsets, inside, 0.0).to(tl.float64)
        tl.store(sums + row * C + c, tl.sum(total, 0).to(tl.float32), c < C)


def finish_sums(partial: Tensor) -> Tensor:
    """float32 [3, C] from the parts' sums [parts, 1 to 3, C]."""
    parts, rows, channels = partial.shape
    sums = torch.empty(3, channels, dtype=torch.float32, device=partial.device)
    launch.launch(
        _sums_final_kernel,
        final_grid(channels),
        (partial, sums, channels, parts),
        ROWS=rows,
        BLOCK_P=FINAL_P,
        BLOCK_C=FINAL_C,
        num_warps=WARPS,
    )
    return sums

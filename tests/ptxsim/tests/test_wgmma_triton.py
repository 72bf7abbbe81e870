"""Triton's own matrix products for sm_90, made of wgmma, against numpy: an independent reading of the descriptors."""

import pytest
import torch

from ptxsim import Kernel
from ptxsim import triton_kernels as kernels
from ptxsim.compilers import compile_triton
from ptxsim.tests.test_faults import survivors

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def operands(m, n, k, dtype, seed=0):
    """Small integers: every sum is exact, so any order of accumulation gives the same bits."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randint(-4, 5, (m, k), generator=g).to(DTYPES[dtype])
    b = torch.randint(-2, 3, (k, n), generator=g).to(DTYPES[dtype])
    return a, b, torch.empty(m, n)


def compiled(a, b, c, **meta):
    m, k, n = *a.shape, b.shape[1]
    binary, bound = compile_triton(kernels.matmul, a, b, c, m, n, k, capability=90, **meta)
    return binary, [bound[name] for name in binary.passed]


def run(kernel, binary, values, a, b, c, meta, seed=0):
    grid = (-(-a.shape[0] // meta["BM"]), -(-b.shape[1] // meta["BN"]))
    report = kernel.launch(grid, binary.threads, *values, shared=binary.shared, outputs=[c], seed=seed)
    return torch.equal(c, a.float() @ b.float()), report


# Columns of a tile choose the swizzle of b, which is MN-major: 16 columns of 16 bits are 32 bytes, 32 are 64. BK does
# so for a, which is K-major.
@pytest.mark.parametrize(
    ("dtype", "tile", "stages", "warps"),
    [
        ("fp16", (64, 64, 64), 1, 4),
        ("fp16", (64, 64, 64), 2, 4),
        ("fp16", (64, 128, 64), 3, 4),
        ("fp16", (128, 128, 32), 4, 8),
        ("fp16", (64, 16, 16), 1, 4),
        ("fp16", (64, 32, 16), 2, 4),
        ("bf16", (64, 32, 32), 3, 4),
        ("bf16", (128, 64, 128), 2, 4),
        ("bf16", (64, 256, 32), 4, 8),
        ("fp32", (64, 64, 32), 1, 4),
        ("fp32", (64, 32, 16), 3, 4),
    ],
)
def test_matmul_exact_on_integers(dtype, tile, stages, warps):
    meta = {**dict(zip(("BM", "BN", "BK"), tile, strict=True)), "num_stages": stages, "num_warps": warps}
    a, b, c = operands(112, 144, 160, dtype, stages)
    binary, values = compiled(a, b, c, **meta)
    assert "wgmma.mma_async" in binary.ptx
    for seed in range(2):
        exact, report = run(Kernel(binary.ptx), binary, values, a, b, c, meta, seed)
        assert exact
    blocks, steps = -(-112 // tile[0]) * -(-144 // tile[1]), -(-160 // tile[2])
    assert sum(report.mma_flops.values()) == blocks * steps * 2 * tile[0] * tile[1] * tile[2]


@pytest.mark.parametrize(("stages", "warps"), [(1, 4), (2, 4), (3, 4), (3, 8)])
def test_what_orders_tritons_matmul_is_needed(stages, warps):
    """Deleting one statement must be noticed, by a fault or by wrong results, unless it repeats what another does: the
    pipelined loop closes with waits, barriers and fences that its epilogue has once more."""
    meta = {"BM": 64 * warps // 4, "BN": 32, "BK": 32, "num_stages": stages, "num_warps": warps}
    a, b, c = operands(meta["BM"], 32, 160, "fp16")
    binary, values = compiled(a, b, c, **meta)
    pattern = r"^\s*(wgmma\.(wait_group|fence|commit_group)|fence\.proxy|bar\.sync|cp\.async\.wait_group).*$"
    left = survivors(binary.ptx, pattern, binary.name, lambda kernel: run(kernel, binary, values, a, b, c, meta)[0])
    print(left)
    assert left == []

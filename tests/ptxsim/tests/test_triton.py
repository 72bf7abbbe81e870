"""Triton's compiled kernels against numpy."""

import numpy as np
import pytest
import torch
import triton

from ptxsim import triton_kernels as kernels
from ptxsim.compilers import compile_triton
from ptxsim.device import SimulatedDevice

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
UNIT = {"fp16": 2.0**-11, "bf16": 2.0**-8, "fp32": 2.0**-24}  # rounding error of one store


def run(kernel, grid, *args, seed=0, **meta):
    device = SimulatedDevice(seed=seed)
    device.triton(kernel, grid, args, meta)
    return device.launches[-1][1]


def normal(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 255, 4096, 10007])
def test_add_relu(dtype, n):
    x, y = normal(n, dtype=dtype), normal(n, dtype=dtype, seed=1)
    out = torch.empty_like(x)
    report = run(kernels.add_relu, (-(-n // 1024),), x, y, out, n, B=1024)
    assert torch.equal(out, torch.relu(x + y))
    assert report.compulsory_bytes == (2 * n * x.element_size(), n * x.element_size())


@pytest.mark.parametrize("warps", [1, 4, 8])
def test_softmax(warps):
    x = normal(7, 1000, dtype="fp32") * 10
    y = torch.empty_like(x)
    run(kernels.softmax, (7,), x, y, 1000, B=1024, num_warps=warps)
    # exp2 and the sum each err by a few units in the last place of values at most 1
    assert (y.double() - torch.softmax(x.double(), 1)).abs().max() < 8 * 2.0**-24


@pytest.mark.parametrize(
    ("dtype", "stages", "warps"),
    [
        ("fp16", 1, 4),
        ("fp16", 3, 4),
        ("fp16", 4, 8),
        ("bf16", 2, 4),
        ("bf16", 3, 8),
        ("fp32", 1, 4),
        ("fp32", 2, 8),
        ("fp32", 4, 4),
    ],
)
def test_matmul_exact_on_integers(dtype, stages, warps):
    """Small integers make every sum exact, so any order of accumulation gives the same bits."""
    m, n, k = 100, 72, 88
    g = torch.Generator().manual_seed(stages)
    a = torch.randint(-4, 5, (m, k), generator=g).to(DTYPES[dtype])
    b = torch.randint(-2, 3, (k, n), generator=g).to(DTYPES[dtype])
    c = torch.empty(m, n)
    report = run(kernels.matmul, (2, 2), a, b, c, m, n, k, BM=64, BN=64, BK=32, num_warps=warps, num_stages=stages)
    assert torch.equal(c, a.float() @ b.float())
    assert sum(report.mma_flops.values()) == 2 * 128 * 128 * 96  # whole tiles: padding is multiplied too


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_rounding(dtype):
    a, b = normal(64, 256, dtype=dtype), normal(256, 64, dtype=dtype, seed=1)
    c = torch.empty(64, 64, dtype=a.dtype)
    run(kernels.matmul, (1, 1), a, b, c, 64, 64, 256, BM=64, BN=64, BK=32, num_stages=3)
    if dtype == "fp32":  # tf32 drops 13 bits of each factor: relative error of a product below 2^-9
        bound = 2.0**-9 * (a.double().abs() @ b.double().abs())
    else:  # products are exact; 256 float additions, then one rounding
        bound = (
            256 * 2.0**-24 * (a.double().abs() @ b.double().abs())
            + UNIT[dtype] * (a.double() @ b.double()).abs() * 1.01
        )
    assert ((c.double() - a.double() @ b.double()).abs() <= bound).all()


@pytest.mark.parametrize(("dtype", "stages", "warps"), [("bf16", 3, 4), ("fp16", 2, 8)])
def test_convolution(dtype, stages, warps):
    n, h, w, c, k = 2, 7, 5, 32, 48
    g = torch.Generator().manual_seed(3)
    x = torch.randint(-2, 3, (n, h, w, c), generator=g).to(DTYPES[dtype])
    f = torch.randint(-1, 2, (3, 3, c, k), generator=g).to(DTYPES[dtype])
    bias = torch.randint(-3, 4, (k,), generator=g).float()
    out = torch.empty(n, h, w, k)
    grid = (-(-n * h * w // 64), -(-k // 32))
    run(
        kernels.conv3x3,
        grid,
        x,
        f,
        bias,
        out,
        n,
        h,
        w,
        C=c,
        K=k,
        BM=64,
        BN=32,
        BC=32,
        num_warps=warps,
        num_stages=stages,
    )
    expected = torch.conv2d(
        x.permute(0, 3, 1, 2).double(), f.permute(3, 2, 0, 1).double(), bias.double(), padding=1
    ).relu()
    assert torch.equal(out.double(), expected.permute(0, 2, 3, 1))


def test_channel_moments():
    x = normal(300, 70, dtype="fp16")
    mean, var = torch.empty(70), torch.empty(70)
    run(kernels.channel_moments, (3,), x, mean, var, 300, 70, BP=64, BC=32)
    # sums of 300 values: at most 300 roundings of 2^-24 relative to the sum of magnitudes
    assert (mean.double() - x.double().mean(0)).abs().max() < 300 * 2.0**-24 * x.double().abs().mean(0).max()
    assert (var.double() - x.double().var(0, unbiased=False)).abs().max() < 600 * 2.0**-24 * (x.double() ** 2).mean(
        0
    ).max()


def test_atomics():
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 37, 5000).astype(np.int32))
    counts, total = torch.zeros(37, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    run(kernels.histogram, (5,), x, counts, total, 5000, B=1024)
    assert counts.tolist() == torch.bincount(x, minlength=37).tolist()
    assert total.item() == x.max()


@pytest.mark.parametrize("seed", range(3))
def test_last_block_reduces(seed):
    x = torch.arange(4000, dtype=torch.float32)
    partial, count, out = torch.zeros(16), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    run(kernels.split_sum, (16,), x, partial, count, out, 4000, PARTS=16, B=256, seed=seed)
    assert out.item() == x.double().sum()


def test_scan():
    x = torch.from_numpy(np.random.default_rng(1).integers(-9, 9, (3, 500)).astype(np.int32))
    y = torch.empty_like(x)
    run(kernels.scan_rows, (3,), x, y, 500, B=512)
    assert torch.equal(y, x.cumsum(1).to(torch.int32))


def test_wrappers_are_refused():
    """What an autotuner would choose is not what a test should run."""
    tuned = triton.autotune([triton.Config({"B": 64})], key=["n"])(kernels.add_relu)
    with pytest.raises(TypeError, match="kernel is Autotuner, want a JITFunction"):
        compile_triton(tuned)

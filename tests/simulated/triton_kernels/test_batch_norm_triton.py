"""Batch norm with ReLU as passes in Triton, forward and backward, in the simulator, against float64 and eager."""

import re

import pytest
import torch
import torch.nn.functional as F
from helpers import triton_gate as gate
from helpers.support import assert_error_rule, channels_last
from ptxsim.device import simulated

from resnet_fast._triton import batch_norm, finalize, tiles
from resnet_fast._triton.batch_norm import as_rows
from resnet_fast._triton.batch_stats import batch_stats

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = [(4, 64, 16, 17), (2, 3, 9, 11), (3, 24, 5, 5), (1, 300, 4, 3)]
EPS = 1e-5


def data(shape, dtype, mean=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, residual, dy = (channels_last(torch.randn(shape, generator=generator).to(dtype)) for _ in range(3))
    gamma, beta = torch.rand(shape[1], generator=generator) + 0.5, torch.randn(shape[1], generator=generator) * 0.5
    return channels_last((x + mean).to(dtype)), residual, dy, gamma, beta


def ours(x, residual, dy, gamma, beta, eps=EPS):
    """y, mean, variance, and the gradients of x, gamma, beta (and the residual)."""
    rows, added = as_rows(x), None if residual is None else as_rows(residual)
    (mean, var), scale_shift = finalize.finalize_stats(batch_stats(rows), gamma, beta, eps)
    stats = torch.stack((mean, var))
    y, dx, dz = (torch.empty_like(x) for _ in range(3))
    batch_norm.bn_apply(rows, scale_shift, added, None, as_rows(y), True)
    # The sign of the ReLU's argument follows from x alone, or from y where there is a residual.
    relu_source = (rows, scale_shift) if residual is None else (as_rows(y), None)
    partial = batch_norm.bn_backward_reduce(as_rows(dy), None, *relu_source, [rows], [stats], as_rows(dz))
    dgamma, dbeta = torch.empty_like(mean), torch.empty_like(mean)
    coefficients = finalize.finalize_gradients(partial, 1, len(rows), stats, eps, True, gamma, (None, dgamma, dbeta))
    batch_norm.bn_input_gradient(as_rows(dz), rows, coefficients, as_rows(dx))
    return y, mean, var, dx, dgamma, dbeta, *([] if residual is None else [dz])


def eager(x, residual, dy, gamma, beta, dtype):
    x, residual, gamma, beta = (
        None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, residual, gamma, beta)
    )
    y = F.batch_norm(x, None, None, gamma, beta, training=True, eps=EPS)
    y = F.relu(y if residual is None else y + residual)
    wanted = [t for t in (x, gamma, beta, residual) if t is not None]
    var, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
    return y.detach(), mean, var, *torch.autograd.grad(y, wanted, dy.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("add", [False, True], ids=["bn_relu", "bn_add_relu"])
def test_error_rule(simulated_device, shape, dtype, add):
    x, residual, dy, gamma, beta = data(shape, dtype)
    case = (x, residual if add else None, dy, gamma, beta)
    out, exact, same = ours(*case), eager(*case, torch.float64), eager(*case, dtype)
    for what, a, e, s in zip(
        ("y", "mean", "var", "dx", "dgamma", "dbeta", "dresidual"), out, exact, same, strict=False
    ):
        assert_error_rule(a, e, [s], what)


def test_large_means_do_not_cancel(simulated_device):
    x = channels_last(torch.randn(4, 16, 16, 16) + 1000)
    (mean, var), (scale, _) = finalize.finalize_stats(batch_stats(as_rows(x)), eps=EPS)
    v, m = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    eager_m = x.mean((0, 2, 3))
    assert_error_rule(mean, m, [eager_m], "mean")
    # Differences from the first row are exact here; after that at most two roundings of each square, and fewer than 14
    # additions one after another, each 2^-24 of the sum.
    assert ((var - v).abs() <= 16 * 2.0**-24 * v).all(), (var - v) / v
    assert torch.allclose(scale.double(), (v + EPS) ** -0.5, rtol=16 * 2.0**-24, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact(simulated_device, dtype):
    """Half of each channel 3 and half -1: mean 1, variance 4, scale 1; every sum is of small integers."""
    x = torch.tensor([3.0, -1.0]).repeat(256).view(2, 1, 16, 16).expand(2, 16, 16, 16).contiguous().to(dtype)
    gamma, beta = torch.full((16,), 2.0), torch.arange(16.0) - 8
    residual, dy = (channels_last(torch.randint(-3, 4, x.shape).to(dtype)) for _ in range(2))
    y, mean, var, _, dgamma, dbeta, dresidual = ours(channels_last(x), residual, dy, gamma, beta, 0.0)
    z = (x - 1) + beta[:, None, None].to(dtype) + residual
    assert torch.equal(y, F.relu(z))
    assert (mean.tolist(), var.tolist()) == ([1.0] * 16, [4.0] * 16)
    dz = torch.where(z > 0, dy, 0)
    assert torch.equal(dresidual, dz)
    assert torch.equal(dbeta, dz.float().sum((0, 2, 3)))
    assert torch.equal(dgamma, (dz.float() * (x.float() - 1) / 2).sum((0, 2, 3)))


def test_nan_stays_in_its_channel(simulated_device):
    x, residual, dy, gamma, beta = data((2, 3, 9, 11), torch.float16)
    x[0, 1, 2, 3] = torch.nan
    residual[1, 2, 0, 0] = torch.nan
    y, _, _, dx, dgamma, _, _ = ours(x, residual, dy, gamma, beta)
    assert not y[:, 0].isnan().any()
    assert y[:, 1].isnan().all()
    assert y[:, 2].isnan().sum() == 1
    assert dx[:, 1].isnan().all()
    assert dgamma.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("add", [False, True], ids=["bn_relu", "bn_add_relu"])
def test_same_bits_in_any_order_of_blocks(add):
    x, residual, dy, gamma, beta = data((4, 64, 16, 17), torch.float16)
    results = []
    for seed in range(3):
        with simulated(seed=1000 * seed):
            results.append(ours(x, residual if add else None, dy, gamma, beta))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))


def test_one_row(simulated_device):
    """Of one value the variance is 0, so y = relu(beta + residual) and dx = 0, but for rounding what cancels."""
    x, residual, dy, gamma, beta = data((1, 5, 1, 1), torch.float32)
    gamma, beta = gamma[:, None, None], beta[:, None, None]
    for r in (None, residual):
        y, _, var, dx, _, _, *_ = ours(x, r, dy, gamma.flatten(), beta.flatten())
        z = beta + (torch.zeros_like(x) if r is None else r)
        # The shift, -scale * x + beta, is rounded once, and so are scale * x + shift and the sum with the residual.
        shift = gamma * x.abs() / EPS**0.5 + beta.abs()
        assert ((y - F.relu(z)).abs() <= 2.0**-24 * (shift + beta.abs() + z.abs()) * 1.001).all()
        assert not var.any()
        # Of a * g + constant both a and the constant, -a * g, are rounded once.
        assert (dx.abs() <= 2.0**-23 * gamma * dy.abs() / EPS**0.5 * 1.001).all()


def test_without_affine(simulated_device):
    x, residual, dy, _, _ = data((2, 16, 5, 6), torch.float32)
    exact = F.relu(F.batch_norm(x.double(), None, None, training=True, eps=EPS) + residual.double())
    eager_y = F.relu(F.batch_norm(x, None, None, training=True, eps=EPS) + residual)
    assert_error_rule(ours(x, residual, dy, None, None)[0], exact, [eager_y])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_traffic(simulated_device, dtype):
    """A pass reads an activation once and writes its result once, in whole sectors; shared memory has no conflicts."""
    shape = (4, 64, 16, 16)
    x, residual, dy, gamma, beta = data(shape, dtype)
    ours(x, residual, dy, gamma, beta)
    ours(x, None, dy, gamma, beta)
    moved: dict[str, list[tuple]] = {}
    for name, report in simulated_device.launches:
        assert report.conflicts() == []
        if "finalize" in name:
            continue
        big = {k: (b["read"], b["written"]) for k, b in report.buffers.items() if k in ACTIVATIONS}
        moved.setdefault(name, []).append(big)
        # What is not activations are the channels' vectors: of fp16 a thread's eight floats are two loads, each of
        # which touches all sectors of the vector.
        extra = report.sectors[0] - report.sectors[1]
        if dtype == torch.float32 or name == "_batch_stats_kernel":
            assert extra == 0, name
        else:
            vectors = sum(VECTORS.get(k, 0) for k in report.buffers)
            assert extra == vectors * 64 * 4 // 32 * tiles.WARPS * tiles_of(name, x), name
    n = x.nbytes
    reads, writes = (n, 0), (0, n)
    assert moved["_batch_stats_kernel"] == [{"x": reads}] * 2
    assert moved["_bn_apply_kernel"] == [{"y": reads, "residual": reads, "out": writes}, {"y": reads, "out": writes}]
    sums = {"grad": reads, "out": writes}
    assert moved["_bn_backward_reduce_kernel"] == [
        sums | {"y": reads, "relu_source": reads},
        sums | {"relu_source / y": reads},
    ]
    assert moved["_bn_input_gradient_kernel"] == [{"grad": reads, "y": reads, "dy": writes}] * 2


ACTIVATIONS = {"x", "y", "residual", "out", "grad", "relu_source", "relu_source / y", "dy"}
VECTORS = {"scale_shift": 2, "coefficients": 4, "stats": 1}


def tiles_of(name, x):
    """How often the pass loads the channels' vectors: once a tile."""
    sizes = (x.numel() // x.shape[1], x.shape[1], x.dtype.itemsize)
    plan = (tiles.reduction if "reduce" in name else tiles.tiling)(*sizes)
    return plan.grid[0] * plan.grid[1] * (plan.rows // plan.block_m if "reduce" in name else 1)


@pytest.mark.parametrize("arch", gate.ARCHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_code(arch, dtype):
    x, residual, dy, gamma, beta = data((8, 64, 28, 28), dtype)
    for r in (None, residual):
        for kernel, args, meta in gate.launches(ours, x, r, dy, gamma, beta):
            sass = gate.inspect_launch(kernel, args, meta, arch)
            name = kernel.__name__
            assert sass.spills == sass.stack == 0, name
            if "finalize" in name:  # a few thousand numbers
                continue
            assert sass.count("LDG.128") > 0, name
            assert sass.blocks_per_sm >= (2 if "reduce" in name or "stats" in name else 8), (name, sass.blocks_per_sm)
            assert re.search(r"m(ul|ad)\.lo\.s64", sass.ptx), name  # row * channels, past 2^31 elements
            if name != "_batch_stats_kernel":
                assert sass.count("STG.128") > 0, name


@pytest.mark.parametrize("m", [1, 7, 49, 1000, 25088, 2**32 + 5])
@pytest.mark.parametrize("channels", [1, 3, 16, 24, 64, 96, 512, 2048])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_geometry_covers_each_row_and_channel_once(m, channels, itemsize):
    plan = tiles.reduction(m, channels, itemsize)
    assert (plan.parts - 1) * plan.rows < m <= plan.parts * plan.rows
    assert plan.grid == (plan.parts, -(-channels // plan.block_c))
    assert plan.rows % plan.block_m == 0
    assert plan.grid[0] * plan.grid[1] <= tiles.MOST_PARTS
    plan = tiles.tiling(m, channels, itemsize)
    assert (plan.grid[0] - 1) * plan.block_m < m <= plan.grid[0] * plan.block_m
    assert (plan.grid[1] - 1) * plan.block_c < channels <= plan.grid[1] * plan.block_c
    assert tiles.TILE // 4 <= plan.block_m * plan.block_c <= tiles.TILE

"""Batch norm with ReLU in Triton, forward and backward, executed in the simulator against float64 and eager."""

import pytest
import torch
import torch.nn.functional as F
from helpers import triton_gate as gate
from helpers.support import assert_error_rule, channels_last
from ptxsim.device import simulated

from resnet_fast._triton import bn_add_relu, bn_relu, tiles
from resnet_fast._triton.batch_stats import DTYPES, batch_stats

SHAPES = [(4, 64, 16, 17), (2, 3, 9, 11), (3, 24, 5, 5), (1, 300, 4, 3)]
EPS = 1e-5


def data(shape, dtype, mean=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, residual, dy = (channels_last(torch.randn(shape, generator=generator).to(dtype)) for _ in range(3))
    gamma, beta = torch.rand(shape[1], generator=generator) + 0.5, torch.randn(shape[1], generator=generator) * 0.5
    return channels_last((x + mean).to(dtype)), residual, dy, gamma, beta


def ours(x, residual, dy, gamma, beta):
    """y, mean, variance, and the gradients of x, gamma, beta (and the residual)."""
    if residual is None:
        y, mean, var, invstd = bn_relu.bn_relu_fwd(x, gamma, beta, EPS)
        return y, mean, var, *bn_relu.bn_relu_bwd(dy, x, mean, invstd, gamma, beta)
    y, mean, var, invstd, mask = bn_add_relu.bn_add_relu_fwd(x, residual, gamma, beta, EPS)
    dx, dresidual, dgamma, dbeta = bn_add_relu.bn_add_relu_bwd(dy, x, mask, mean, invstd, gamma)
    return y, mean, var, dx, dgamma, dbeta, dresidual


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
    assert out[0].dtype == out[3].dtype == dtype
    assert out[0].is_contiguous(memory_format=torch.channels_last)
    for what, a, e, s in zip(
        ("y", "mean", "var", "dx", "dgamma", "dbeta", "dresidual"), out, exact, same, strict=False
    ):
        assert_error_rule(a, e, [s], what)


def test_large_means_do_not_cancel(simulated_device):
    x = channels_last(torch.randn(4, 16, 16, 16) + 1000)
    mean, var, invstd = batch_stats(x, EPS)
    v, m = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    eager_m = x.mean((0, 2, 3))
    assert_error_rule(mean, m, [eager_m], "mean")
    # Differences from the first row are exact here; after that at most two roundings of each square, and fewer than 14
    # additions one after another, each 2^-24 of the sum.
    assert ((var - v).abs() <= 16 * 2.0**-24 * v).all(), (var - v) / v
    assert torch.allclose(invstd.double(), (v + EPS) ** -0.5, rtol=16 * 2.0**-24, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact(simulated_device, dtype):
    """Half of each channel 3 and half -1: mean 1, variance 4, invstd 1/2; every sum is of small integers."""
    x = torch.tensor([3.0, -1.0]).repeat(256).view(2, 1, 16, 16).expand(2, 16, 16, 16).contiguous().to(dtype)
    gamma, beta = torch.full((16,), 2.0), torch.arange(16.0) - 8
    residual = torch.randint(-3, 4, x.shape).to(dtype)
    y, mean, var, invstd, mask = bn_add_relu.bn_add_relu_fwd(x, residual, gamma, beta, 0.0)
    z = (x - 1) + beta[:, None, None].to(dtype) + residual
    assert torch.equal(y, F.relu(z))
    assert (mean.tolist(), var.tolist(), invstd.tolist()) == ([1.0] * 16, [4.0] * 16, [0.5] * 16)
    bits = (mask[:, :, None] >> torch.arange(8)) & 1
    assert torch.equal(bits.view(-1, 16).bool(), (z > 0).permute(0, 2, 3, 1).reshape(-1, 16))
    dy = torch.randint(-3, 4, x.shape).to(dtype)
    _, dresidual, dgamma, dbeta = bn_add_relu.bn_add_relu_bwd(dy, x, mask, mean, invstd, gamma)
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


@pytest.mark.parametrize("shape", [(1, 5, 1, 1), (0, 16, 4, 4)], ids=str)
def test_one_row_and_none(simulated_device, shape):
    """Of one value the variance is 0, so y = relu(beta + residual) and dx = 0; without values nothing is launched."""
    x, residual, dy, gamma, beta = data(shape, torch.float32)
    for r in (None, residual):
        y, _, var, dx, _, _, *_ = ours(x, r, dy, gamma, beta)
        assert torch.equal(y, F.relu(beta[:, None, None] + (torch.zeros_like(x) if r is None else r)))
        assert not var.any()
        assert dx.shape == shape
        assert not dx.any()
    assert bool(simulated_device.launches) == bool(x.numel())


def test_any_layout_and_no_affine(simulated_device):
    x, residual, dy, _, _ = data((2, 16, 5, 6), torch.float32)
    plain = ours(x, residual, dy, None, None)
    other = ours(x.contiguous(), residual.contiguous(), dy.contiguous(), None, None)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    exact = F.relu(F.batch_norm(x.double(), None, None, training=True, eps=EPS) + residual.double())
    eager_y = F.relu(F.batch_norm(x, None, None, training=True, eps=EPS) + residual)
    assert_error_rule(plain[0], exact, [eager_y])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_traffic(simulated_device, dtype):
    """Each activation moves as often as the docstrings say, in whole sectors; shared memory has no conflicts."""
    shape = (4, 64, 16, 16)
    x, residual, dy, gamma, beta = data(shape, dtype)
    ours(x, residual, dy, gamma, beta)
    ours(x, None, dy, gamma, beta)
    moved: dict[str, list[tuple]] = {}
    for name, report in simulated_device.launches:
        assert report.conflicts() == []
        big = {k: (b["read"], b["written"]) for k, b in report.buffers.items() if k in ACTIVATIONS}
        moved.setdefault(name, []).append(big)
        # What is not activations are the channels' vectors: of fp16 a thread's eight floats are two loads, each of
        # which touches all sectors of the vector.
        extra = report.sectors[0] - report.sectors[1]
        if dtype == torch.float32 or "stats" in name or "final" in name:
            assert extra == 0, name
        else:
            vectors = 3 * ("coefficients" in report.buffers) + len(PARAMETERS & set(report.buffers))
            assert extra == vectors * 64 * 4 // 32 * tiles.WARPS * blocks(name, x), name
    n = x.nbytes
    reads, writes, mask = (n, 0), (0, n), x.numel() // 8
    both = [{"x": reads}] * 2
    assert moved["_batch_stats_partial_kernel"] == both
    assert moved["_bn_relu_fwd_kernel"] == [{"x": reads, "y": writes}]
    assert moved["_bn_add_relu_fwd_kernel"] == [{"x": reads, "residual": reads, "y": writes, "mask": (0, mask)}]
    assert moved["_bn_relu_bwd_sums_kernel"] == [{"x": reads, "dy": reads}]
    assert moved["_bn_add_relu_bwd_sums_kernel"] == [{"x": reads, "dy": reads, "mask": (mask, 0), "dz": writes}]
    assert moved["_bn_bwd_apply_kernel"] == [{"x": reads, "dy": reads, "dx": writes}] * 2


ACTIVATIONS = {"x", "residual", "dy", "y", "mask", "dz", "dx"}
PARAMETERS = {"mean", "invstd", "gamma", "beta"}


def blocks(name, x):
    m = x.numel() // x.shape[1]
    plan = (tiles.reduction if "sums" in name else tiles.tiling)(m, x.shape[1], x.dtype.itemsize)
    return plan.grid[0] * plan.grid[1]


@pytest.mark.parametrize("arch", gate.ARCHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_code(arch, dtype):
    x, residual, dy, gamma, beta = data((8, 64, 28, 28), dtype)
    for r in (None, residual):
        for kernel, args, meta in gate.launches(ours, x, r, dy, gamma, beta):
            sass = gate.inspect_launch(kernel, args, meta, arch)
            name = kernel.__name__
            assert sass.spills == sass.stack == 0, name
            assert sass.count("LDG.128") > 0, name
            assert sass.blocks_per_sm >= (2 if "sums" in name or "partial" in name else 8 if "final" not in name else 6)
            if name != "_bn_bwd_final_kernel":
                assert "mul.lo.s64" in sass.ptx, name  # row * channels, past 2^31 elements
            if "apply" in name or "fwd" in name:
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
    plan = tiles.tiling(m, channels, itemsize, narrowest=8)
    assert (plan.grid[0] - 1) * plan.block_m < m <= plan.grid[0] * plan.block_m
    assert (plan.grid[1] - 1) * plan.block_c < channels <= plan.grid[1] * plan.block_c
    assert tiles.TILE // 4 <= plan.block_m * plan.block_c <= tiles.TILE


def test_bad_arguments(simulated_device):
    x, residual, dy, gamma, beta = data((2, 3, 4, 4), torch.float16)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\), want \[N, C, H, W\]"):
        bn_relu.bn_relu_fwd(x[:, :, 0, 0], gamma, beta)
    with pytest.raises(TypeError, match=r"x is torch.float64, want torch.float16 or"):
        bn_relu.bn_relu_fwd(x.double(), gamma, beta)
    with pytest.raises(ValueError, match=r"gamma has shape \(2,\), want \(3,\)"):
        bn_relu.bn_relu_fwd(x, gamma[:2], beta)
    with pytest.raises(TypeError, match=r"residual is torch.float32, want torch.float16"):
        bn_add_relu.bn_add_relu_fwd(x, residual.float(), gamma, beta)
    with pytest.raises(ValueError, match=r"mask has shape \(32, 2\), want \(32, 1\)"):
        bn_add_relu.bn_add_relu_bwd(dy, x, torch.zeros(32, 2, dtype=torch.uint8), gamma, gamma, gamma)

"""Batch norm with ReLU in CUDA C++, forward and backward, executed in the simulator against float64 and eager."""

import pytest
import torch
import torch.nn.functional as F
from cuda_support import cuda_device
from support import assert_error_rule, channels_last
from test_bn_relu_triton import EPS, SHAPES, data, eager

from resnet_fast._triton import cuda_batch_norm as bn
from resnet_fast._triton.batch_stats import DTYPES


@pytest.fixture
def device():
    with cuda_device() as simulated:
        yield simulated


def ours(x, residual, dy, gamma, beta):
    """y, mean, variance, and the gradients of x, gamma, beta (and the residual)."""
    if residual is None:
        y, mean, var, invstd = bn.bn_relu_fwd(x, gamma, beta, EPS)
        return y, mean, var, *bn.bn_relu_bwd(dy, x, mean, invstd, gamma, beta)
    y, mean, var, invstd, mask = bn.bn_add_relu_fwd(x, residual, gamma, beta, EPS)
    dx, dresidual, dgamma, dbeta = bn.bn_add_relu_bwd(dy, x, mask, mean, invstd, gamma)
    return y, mean, var, dx, dgamma, dbeta, dresidual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("add", [False, True], ids=["bn_relu", "bn_add_relu"])
def test_error_rule(device, shape, dtype, add):
    x, residual, dy, gamma, beta = data(shape, dtype)
    case = (x, residual if add else None, dy, gamma, beta)
    out, exact, same = ours(*case), eager(*case, torch.float64), eager(*case, dtype)
    assert out[0].dtype == out[3].dtype == dtype
    assert out[0].is_contiguous(memory_format=torch.channels_last)
    for what, a, e, s in zip(
        ("y", "mean", "var", "dx", "dgamma", "dbeta", "dresidual"), out, exact, same, strict=False
    ):
        assert_error_rule(a, e, [s], what)
    assert len(device.launches) == 6
    vector = int(shape[1] % 8 == 0)
    assert all(name.endswith(f", {vector}>") for name, _ in device.launches if "final" not in name)


def test_large_means_do_not_cancel(device):
    x = channels_last(torch.randn(4, 16, 16, 16) + 1000)
    mean, var, invstd = bn.batch_stats(x, EPS)
    v, m = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert_error_rule(mean, m, [x.mean((0, 2, 3))], "mean")
    # Differences from the first row are exact here; after that at most two roundings of each square, and fewer than 14
    # additions one after another, each 2^-24 of the sum.
    assert ((var - v).abs() <= 16 * 2.0**-24 * v).all(), (var - v) / v
    assert torch.allclose(invstd.double(), (v + EPS) ** -0.5, rtol=16 * 2.0**-24, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [16, 12])
def test_integers_are_exact(device, dtype, channels):
    """Half of each channel 3 and half -1: mean 1, variance 4, invstd 1/2; every sum is of small integers."""
    x = torch.tensor([3.0, -1.0]).repeat(256).view(2, 1, 16, 16).expand(2, channels, 16, 16).contiguous().to(dtype)
    gamma, beta = torch.full((channels,), 2.0), torch.arange(float(channels)) - 8
    residual = torch.randint(-3, 4, x.shape).to(dtype)
    y, mean, var, invstd, mask = bn.bn_add_relu_fwd(x, residual, gamma, beta, 0.0)
    z = (x - 1) + beta[:, None, None].to(dtype) + residual
    assert torch.equal(y, F.relu(z))
    assert (mean.tolist(), var.tolist(), invstd.tolist()) == ([1.0] * channels, [4.0] * channels, [0.5] * channels)
    bits = (mask[:, :, None] >> torch.arange(8)).view(len(mask), -1) & 1
    assert torch.equal(bits[:, :channels].bool(), (z > 0).permute(0, 2, 3, 1).reshape(-1, channels))
    assert not bits[:, channels:].any()
    dy = torch.randint(-3, 4, x.shape).to(dtype)
    _, dresidual, dgamma, dbeta = bn.bn_add_relu_bwd(dy, x, mask, mean, invstd, gamma)
    dz = torch.where(z > 0, dy, 0)
    assert torch.equal(dresidual, dz)
    assert torch.equal(dbeta, dz.float().sum((0, 2, 3)))
    assert torch.equal(dgamma, (dz.float() * (x.float() - 1) / 2).sum((0, 2, 3)))


def test_nan_stays_in_its_channel(device):
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
        with cuda_device(seed=1000 * seed):
            results.append(ours(x, residual if add else None, dy, gamma, beta))
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))


@pytest.mark.parametrize("shape", [(1, 5, 1, 1), (0, 16, 4, 4)], ids=str)
def test_one_row_and_none(device, shape):
    """Of one value the variance is 0, so y = relu(beta + residual) and dx = 0; without values nothing is launched."""
    x, residual, dy, gamma, beta = data(shape, torch.float32)
    for r in (None, residual):
        y, _, var, dx, _, _, *_ = ours(x, r, dy, gamma, beta)
        assert torch.equal(y, F.relu(beta[:, None, None] + (torch.zeros_like(x) if r is None else r)))
        assert not var.any()
        assert dx.shape == shape
        assert not dx.any()
    assert bool(device.launches) == bool(x.numel())


def test_any_layout_and_no_affine(device):
    x, residual, dy, _, _ = data((2, 16, 5, 6), torch.float32)
    plain = ours(x, residual, dy, None, None)
    other = ours(x.contiguous(), residual.contiguous(), dy.contiguous(), None, None)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    exact = F.relu(F.batch_norm(x.double(), None, None, training=True, eps=EPS) + residual.double())
    eager_y = F.relu(F.batch_norm(x, None, None, training=True, eps=EPS) + residual)
    assert_error_rule(plain[0], exact, [eager_y])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_traffic(device, dtype):
    """Each activation moves as often as the equations ask for, in whole sectors; shared memory has no conflicts."""
    x, residual, dy, gamma, beta = data((4, 64, 10, 25), dtype)  # no vector of sums is as long as the mask
    ours(x, residual, dy, gamma, beta)
    ours(x, None, dy, gamma, beta)
    n, mask = x.nbytes, x.numel() // 8
    moved = {
        "bn_stats_partial": n,
        "bn_apply": 2 * n,
        "bn_apply_add": 3 * n + mask,
        "bn_backward_sums": 2 * n,
        "bn_backward_sums_add": 3 * n + mask,
        "bn_backward_apply": 3 * n,
        "bn_backward_apply_relu": 3 * n,
    }
    seen = set()
    for name, report in device.launches:
        assert report.conflicts() == [], name
        stem = name.split("<")[0]
        if "final" in stem:
            continue
        seen.add(stem)
        big = sum(b["read"] + b["written"] for b in report.buffers.values() if b["bytes"] in (n, mask))
        assert big == moved[stem], name
        # Requests of whole pieces waste no sector.
        wasted = [r for r in report.rows if r.kind.endswith("_global") and ".v4" in r.text and r.units != r.ideal]
        assert dtype == torch.float32 or wasted == [], name
    assert seen == set(moved)


@pytest.mark.parametrize("m", [1, 7, 49, 1000, 25088, 2**32 + 5])
@pytest.mark.parametrize("channels", [1, 3, 16, 24, 64, 96, 512, 2048])
def test_geometry_covers_each_row_and_channel_once(m, channels):
    across, row_blocks, channel_blocks, parts, part_rows, final_blocks = bn.plan(m, channels)
    down = bn.THREADS // across
    assert (parts - 1) * part_rows < m <= parts * part_rows
    assert part_rows % down == 0
    assert (row_blocks - 1) * 4 * down < m <= row_blocks * 4 * down
    assert (channel_blocks - 1) * 8 * across < channels <= channel_blocks * 8 * across
    assert (final_blocks - 1) * 16 < channels <= final_blocks * 16
    assert parts * channel_blocks <= max(512, channel_blocks)


def test_bad_arguments(device):
    x, residual, dy, gamma, beta = data((2, 3, 4, 4), torch.float16)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\), want \[N, C, H, W\]"):
        bn.bn_relu_fwd(x[:, :, 0, 0], gamma, beta)
    with pytest.raises(TypeError, match=r"x is torch.float64, want torch.float16 or"):
        bn.bn_relu_fwd(x.double(), gamma, beta)
    with pytest.raises(TypeError, match=r"residual is torch.float32, want torch.float16"):
        bn.bn_add_relu_fwd(x, residual.float(), gamma, beta)
    with pytest.raises(ValueError, match=r"mask has shape \(32, 2\), want \(32, 1\)"):
        bn.bn_add_relu_bwd(dy, x, torch.zeros(32, 2, dtype=torch.uint8), gamma, gamma, gamma)
    with pytest.raises(RuntimeError, match=r"rows and channels are 0 and 3, want at least 1"):
        bn.plan(0, 3)

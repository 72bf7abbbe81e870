"""Residual blocks and stages in eval mode."""

import pytest
import torch
from helpers.support import LAYOUTS, assert_error_rule, assert_same_model, eager_results, exact_kernels, twins
from torch import nn

from resnet_fast import backends, blocks, reference

KINDS = {
    "Block": (blocks.Block, reference.Block),
    "BasicBlock": (blocks.BasicBlock, reference.BasicBlock),
    "Bottleneck": (blocks.Bottleneck, reference.Bottleneck),
}


def block_twins(kind, width, out, stride, **kwargs):
    """`width` is the number of channels that come in, whatever the block's expansion."""
    return twins(*KINDS[kind], width, out, stride, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "out", "stride", "shape"),
    [
        (16, 16, 1, (3, 8, 8)),
        (16, 32, 2, (2, 9, 7)),
        (17, 5, 1, (1, 6, 11)),
        (64, 16, 1, (2, 7, 7)),
        (3, 3, 2, (5, 1, 1)),
    ],
    ids=str,
)
def test_error_rule(kind, dtype, channels, out, stride, shape):
    fast, eager = (m.to(dtype) for m in block_twins(kind, channels, out, stride))
    x = torch.randn(shape[0], channels, *shape[1:]).to(dtype)
    with backends.use("cpu"):
        with exact_kernels():
            y = assert_same_model(fast, eager, x, factor=2)
        assert_same_model(fast, eager, x)
    assert y.is_contiguous()
    assert backends.fallbacks() == {}


def integers_(block):
    """Weights of +-1, batch norms that scale by powers of two: exact in float32."""
    with torch.no_grad():
        for m in block.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.copy_(torch.randint_like(m.weight, -1, 2))
                if m.bias is not None:
                    m.bias.copy_(torch.randint_like(m.bias, -2, 3))
            elif isinstance(m, nn.BatchNorm2d):
                m.eps = 0.25
                m.running_mean.copy_(torch.randint_like(m.running_mean, -4, 5))
                m.running_var.copy_(torch.tensor([0.25, 1.0, 4.0])[torch.randint(0, 3, m.running_var.shape)] - m.eps)
                m.weight.copy_(torch.randint_like(m.weight, -1, 2))
                m.bias.copy_(torch.randint_like(m.bias, -4, 5))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "out", "stride"), [(16, 16, 1), (16, 32, 2), (17, 3, 1), (64, 16, 1)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_integers_are_exact(kind, channels, out, stride, layout, dtype):
    """Below 2^24: (64 * 9 * 2 + 4) * 2 after one convolution, 2 * 16 * 9 times that after two."""
    fast, eager = block_twins(kind, channels, out, stride)
    integers_(fast)
    eager.load_state_dict(fast.state_dict())
    for m in eager.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eps = 0.25
    fast, eager = fast.to(dtype), eager.double()
    x = torch.randint(-2, 3, (3, channels, 7, 5)).to(dtype)
    with exact_kernels(), backends.use("cpu"), torch.no_grad():
        assert torch.equal(fast(layout(x)).double(), eager(x.double()))


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind):
    fast, eager = block_twins(kind, 16, 32, 2)
    x = torch.randn(0, 16, 9, 9)
    assert fast(x).shape == eager(x).shape


def test_stage():
    def stage(block, sequential):
        return sequential(block(16, 32, 2), block(32, 32, 1), block(32, 32, 1))

    fast, eager = twins(lambda: stage(blocks.Block, blocks.Stage), lambda: stage(reference.Block, nn.Sequential))
    with backends.use("cpu"):
        for batch in (1, 2, 5):
            assert_same_model(fast, eager, torch.randn(batch, 16, 9, 9))
            with exact_kernels():
                assert_same_model(fast, eager, torch.randn(batch, 16, 9, 9), factor=2)
    assert backends.fallbacks() == {}


def test_empty_stage():
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(blocks.Stage().eval()(x), x)


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"momentum": None}, {"eps": 0.5}, {"affine": False, "momentum": None, "eps": 1e-3}],
    ids=str,
)
def test_batch_norm_as_pytorch_has_it(options):
    fast, eager = block_twins("Block", 16, 16, 1)
    for m in (fast, eager):
        m.bn1 = nn.BatchNorm2d(16, **options).eval()
        m.bn1.running_mean.copy_(torch.linspace(-1, 1, 16))
        m.bn1.running_var.copy_(torch.linspace(0.5, 1, 16))
    with backends.use("cpu"):
        assert_same_model(fast, eager, torch.randn(2, 16, 6, 6))


def test_batch_norm_without_statistics_runs_unfused():
    fast, eager = block_twins("Block", 16, 16, 1)
    for m in (fast, eager):
        m.bn2 = nn.BatchNorm2d(16, track_running_stats=False).eval()
    x = torch.randn(2, 16, 6, 6)
    assert torch.equal(fast(x), eager(x))
    assert backends.fallbacks() == {"Block: batch norm without running statistics": 1}


def test_nan_survives_the_relu():
    fast, _ = block_twins("BasicBlock", 16, 16, 1)
    x = torch.randn(2, 16, 6, 6)
    x[0, 3, 2, 2] = torch.nan
    out = fast(x)
    assert out[0, :, 2, 2].isnan().all()
    assert out[1].isfinite().all()


def test_input_is_left_alone():
    fast, _ = block_twins("BasicBlock", 16, 16, 1)
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad():
        fast(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_eagers_where_the_input_does_not_fit(kind):
    fast, eager = block_twins(kind, 16, 16, 1)
    for bad in (torch.randn(2, 15, 6, 6), torch.randn(2, 16, 6, 6).double(), torch.randn(2, 3)):
        with pytest.raises((RuntimeError, ValueError)):
            eager(bad)
        with pytest.raises((RuntimeError, ValueError)):
            fast(bad)


@pytest.mark.parametrize("kind", KINDS)
def test_unbatched_input_is_eagers_affair(kind):
    """A batch norm refuses three dimensions."""
    fast, _ = block_twins(kind, 16, 16, 1)
    with pytest.raises(ValueError, match="4D"):
        fast(torch.randn(16, 6, 6))


def test_padding_by_name():
    fast, eager = block_twins("Block", 16, 16, 1)
    for m in (fast, eager):
        m.conv1.padding = "same"
    with backends.use("cpu"):
        assert_same_model(fast, eager, torch.randn(2, 16, 6, 6))
    for m in (fast, eager):
        m.conv1 = nn.Conv2d(16, 16, 2, padding="same").eval()
        torch.nn.init.constant_(m.conv1.weight, 0.1)
        torch.nn.init.constant_(m.conv1.bias, 0.1)
    x = torch.randn(2, 16, 6, 6)
    assert torch.equal(fast(x), eager(x))
    assert backends.fallbacks() == {"Block: uneven padding": 1}


def test_mixed_dtypes_of_batch_norm():
    """bfloat16 convolutions with float32 batch norms, the usual mixture."""
    fast, eager = block_twins("BasicBlock", 16, 16, 1)
    for m in (fast, eager):
        for part in m.modules():
            if isinstance(part, nn.Conv2d):
                part.bfloat16()
    x = torch.randn(2, 16, 6, 6).bfloat16()
    exact, results = eager_results(eager, x)
    with backends.use("cpu"), torch.no_grad():
        assert_error_rule(fast(x), exact, results)

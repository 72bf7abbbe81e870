"""Max pooling on the way out of a chain, and behind the stems of networks."""

import pytest
import torch
import torch.nn.functional as F
from helpers.support import channels_last, twins
from torch import nn

import resnet_fast
from resnet_fast import backends, models, reference
from resnet_fast.chain.pooling import MaxPool2d, pooling_window

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
stage = torch.ops.resnet_fast.conv_chain
pack = torch.ops.resnet_fast.pack_conv_bn


def convolution(channels, k, dtype, algorithm):
    """A 3x3 convolution with ReLU: its packed filter and its integers."""
    weight = torch.randn(k, channels, 3, 3).to(dtype)
    return [pack(weight, torch.randn(k).to(dtype), *[None] * 4, 0.0, algorithm)], [0, -1, 1, k, 3, 3, 1, 1, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("algorithm", [0, 1, 2])
@pytest.mark.parametrize("window", [(2, 2, 2, 2, 0, 0), (3, 3, 2, 2, 1, 1), (3, 2, 1, 3, 1, 0), (1, 1, 1, 1, 0, 0)])
@pytest.mark.parametrize(("channels", "k", "batch", "size"), [(3, 17, 3, (9, 7)), (16, 64, 1, (12, 3))], ids=str)
def test_the_same_bits_as_pooling_afterwards(dtype, algorithm, window, channels, k, batch, size):
    x = torch.randn(batch, channels, *size).to(dtype)
    x[0, 0, -3, -2] = torch.nan
    x[-1, 0, 0, 0] = torch.inf
    filters, layers = convolution(channels, k, dtype, algorithm)
    y = stage(x, filters, layers, window)
    expected = F.max_pool2d(stage(x, filters, layers), window[:2], window[2:4], window[4:])
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ([2, 2], "pool has 2 integers, want none or 6"),
        ([2, 0, 1, 1, 0, 0], "pool has a window of 2 x 0"),
        ([2, 2, 0, 1, 0, 0], "pool has a window of 2 x 2 and stride 0 x 1"),
        ([2, 3, 1, 1, 0, 2], "padding 0 x 2, want at most half of its window, 2 x 3"),
        ([2, 2, 1, 1, -1, 0], "padding -1 x 0"),
        ([7, 2, 1, 1, 0, 0], "pool's window, 7 x 2, exceeds the map, 6 x 6"),
    ],
)
def test_errors_name_the_pooling(window, message):
    filters, layers = convolution(4, 8, torch.float32, 0)
    with pytest.raises(RuntimeError, match=message):
        stage(torch.randn(1, 4, 6, 6), filters, layers, window)


def test_opcheck():
    filters, layers = convolution(4, 8, torch.float32, 0)
    torch.library.opcheck(stage, (torch.randn(2, 4, 7, 6), filters, layers, [3, 3, 2, 2, 1, 1]))


@pytest.fixture
def stems(monkeypatch):
    """The windows with which stems were run."""
    windows = []
    original = resnet_fast.chain.inference.Chain.run

    def noting(self, x, pool=()):
        windows.append(list(pool))
        return original(self, x, pool)

    monkeypatch.setattr(resnet_fast.chain.inference.Chain, "run", noting)
    return windows


@pytest.mark.parametrize(("name", "window"), [("ResNet32", [2, 2, 2, 2, 0, 0]), ("resnet18", [3, 3, 2, 2, 1, 1])])
def test_stems_pool_where_no_gradient_is_wanted(name, window, stems):
    kwargs = {"image_size": 64} if name == "ResNet32" else {}
    fast, eager = twins(getattr(resnet_fast, name), getattr(reference, name), **kwargs)
    x = channels_last(torch.randn(2, 3, 64, 64))
    with torch.no_grad():
        y, expected = fast.pooled_stem(x), eager.pooled_stem(x)
    assert stems == [window]
    torch.testing.assert_close(y, expected)
    # With a gradient the pooling is a function of its own, as in training.
    x.requires_grad_()
    fast.pooled_stem(x).sum().backward()
    assert stems == [window]
    grad, x.grad = x.grad, None
    eager.pooled_stem(x).sum().backward()
    torch.testing.assert_close(grad, x.grad, rtol=1e-4, atol=1e-4)
    fast.train()
    torch.testing.assert_close(fast.pooled_stem(x), eager.train().pooled_stem(x))


class OwnStem(models.ResNet):
    def stem(self, x):
        return super().stem(x) + 1


@pytest.mark.parametrize("change", ["hook", "ceil_mode", "other pooling", "own forward", "own stem"])
def test_what_pools_otherwise_is_left_alone(change, stems):
    model = (OwnStem if change == "own stem" else models.ResNet)([1, 1, 1, 1]).eval()
    seen = []
    if change == "hook":
        model.maxpool.register_forward_hook(lambda *_: seen.append(1))
    elif change == "ceil_mode":
        model.maxpool.ceil_mode = True
    elif change == "other pooling":
        model.maxpool = nn.AvgPool2d(3, 2, 1)
    elif change == "own forward":
        model.maxpool.forward = lambda x: seen.append(1) or F.max_pool2d(x, 2)
    x = torch.randn(1, 3, 34, 33)
    with torch.no_grad():
        y = model.pooled_stem(x)
        expected = model.maxpool(model.stem(x))
    assert stems == [[], []]
    assert len(seen) == (2 if change in ("hook", "own forward") else 0)
    assert torch.equal(y, expected)


def test_a_fallback_is_counted_once():
    model = models.ResNet([1, 1, 1, 1]).eval()
    model.conv1.register_forward_hook(lambda *_: None)
    before = sum(backends.fallbacks().values())
    with torch.no_grad():
        model.pooled_stem(torch.randn(1, 3, 32, 32))
    assert sum(backends.fallbacks().values()) == before + 1


def test_windows():
    assert pooling_window(nn.MaxPool2d(3)) == [3, 3, 3, 3, 0, 0]
    assert pooling_window(MaxPool2d((3, 2), (2, 1), 1)) == [3, 2, 2, 1, 1, 1]
    assert pooling_window(nn.MaxPool2d(3, dilation=2)) is None
    assert pooling_window(nn.MaxPool2d(3, return_indices=True)) is None
    assert pooling_window(nn.AvgPool2d(3)) is None

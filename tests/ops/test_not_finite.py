"""What is not finite spreads as far as eager spreads it, though tiles of Winograd carry it further."""

import copy

import pytest
import torch
from helpers.support import twins
from torch import nn

import resnet_fast
from resnet_fast import backends, models, reference
from resnet_fast.backends.native import extension
from resnet_fast.chain import cpu_algorithm as choose
from resnet_fast.chain import inference
from resnet_fast.chain.cpu_algorithm import COMPACT_WINOGRAD, WINOGRAD

VALUES = (float("nan"), float("inf"), -float("inf"))


class Layer(nn.Sequential):
    def __init__(self, channels):
        super().__init__(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())


def a_pixel_each(channels, height, width, value):
    """As many images as pixels: each has the value at another one."""
    pixels = height * width
    x = torch.randn(pixels, channels, height, width)
    for i in range(pixels):
        x[i, i % channels, i // width, i % width] = value
    return x


def assert_spreads_as_eager(fast, eager, x, method="__call__", tolerance=1e-3):
    with torch.no_grad():
        ours, theirs = getattr(fast, method)(x), getattr(eager, method)(x)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())
    assert theirs.isfinite().any()
    finite = theirs.isfinite()
    torch.testing.assert_close(ours[finite], theirs[finite], rtol=tolerance, atol=tolerance)
    return theirs


@pytest.fixture(params=[WINOGRAD, COMPACT_WINOGRAD], ids=["stored", "compact"])
def winograd(request, monkeypatch):
    """Winograd in every convolution of 3 x 3, whatever it costs."""
    monkeypatch.setattr(inference, "algorithms", lambda specs, *_: [request.param] * len(specs))


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("channels", [5, 16, 40])
@pytest.mark.parametrize("size", [(8, 8), (9, 7), (4, 6), (11, 5)], ids=str)
def test_each_pixel_of_each_kind_of_tile(size, channels, value, winograd):
    eager = Layer(channels).eval()
    theirs = assert_spreads_as_eager(resnet_fast.fuse(eager), eager, a_pixel_each(channels, *size, value))
    assert not theirs.isfinite().all()


@pytest.mark.parametrize("images", [1, 3])
def test_networks(images):
    fast, eager = twins(models.CifarResNet, reference.CifarResNet, 1)
    x = torch.randn(images, 3, 44, 41)
    x[-1, :, 0, 0] = torch.nan
    x[0, 0, 22, 19] = torch.inf
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = fast.layer1(fast.stem(x)).detach()
            assert torch.equal(y.isnan(), eager.layer1(eager.stem(x)).isnan())
    for ours in (fast, resnet_fast.fuse(eager)):
        assert_spreads_as_eager(ours.layer1[0], eager.layer1[0], eager.stem(x).detach())
        assert_spreads_as_eager(ours, eager, x, "features")
    assert backends.fallbacks() == {}


def test_the_stem_of_a_network_and_its_pooling():
    fast, eager = twins(models.ResNet, reference.ResNet, [1, 1, 1, 1])
    x = torch.randn(1, 3, 64, 64)
    x[0, 1, 8, 9] = torch.nan
    assert_spreads_as_eager(fast.layer1, eager.layer1, eager.pooled_stem(x).detach())
    assert_spreads_as_eager(fast, eager, x, "pooled_stem")


@pytest.fixture
def runs(monkeypatch):
    """For each set of filters that was asked for, whether it was without Winograd."""
    found = []
    filters = inference.Chain.filters

    def noting(self, x, direct=False):
        found.append(direct)
        return filters(self, x, direct)

    monkeypatch.setattr(inference.Chain, "filters", noting)
    return found


@torch.no_grad()
def test_images_are_computed_again_where_it_matters_alone(runs, winograd, monkeypatch):
    fast = resnet_fast.fuse(Layer(16).eval())
    x = torch.randn(2, 16, 8, 8)
    finite = fast(x)
    assert runs == [False]
    x[1, 3, 2, 2] = torch.nan
    spread = fast(x)
    assert runs == [False, False, True]
    fast(torch.full_like(x, 1e38))  # too large for sums, too
    assert runs[-1]
    monkeypatch.setattr(inference, "algorithms", choose.algorithms)
    monkeypatch.setattr(backends.cpu, "allow_winograd", False)
    direct = fast(x)
    assert torch.equal(spread.isnan(), direct.isnan())
    assert torch.equal(spread[0], direct[0])
    torch.testing.assert_close(spread[0], finite[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_another_call_met_does_not_count(runs, winograd):
    fast = resnet_fast.fuse(Layer(16).eval())
    x = torch.randn(2, 16, 8, 8)
    fast(x)
    own = copy.copy(fast._resnet_fast.plans[False].segments[0]._chain)
    bad = torch.full_like(x, torch.nan)
    torch.ops.resnet_fast.conv_chain(bad, own.filters(x), own.layers)
    runs.clear()
    fast(x)
    assert runs == [False]
    assert not extension.take_spread()
    torch.ops.resnet_fast.conv_chain(bad, own.filters(x), own.layers)
    assert [extension.take_spread() for _ in range(2)] == [True, False]


def test_bfloat16():
    """Where products are of bfloat16, tiles of 2 x 2 outputs meet no pixel that each of their windows does not."""
    eager = Layer(32).eval().bfloat16()
    assert_spreads_as_eager(
        resnet_fast.fuse(eager), eager, a_pixel_each(32, 9, 7, torch.nan).bfloat16(), tolerance=0.02
    )

"""Methods put into modules and classes, before and after the first call: what they do is done, as in plain PyTorch."""

import types

import pytest
import torch
import torch.nn.functional as F
from helpers.fuse_checks import prepared
from helpers.support import twins
from torch import nn

import resnet_fast
from resnet_fast import blocks, models, reference

X = (2, 3, 16, 16)


def ours():
    return twins(models.CifarResNet, reference.CifarResNet, 2)


def fused():
    net = prepared(reference.CifarResNet(2))
    return resnet_fast.fuse(net), net


def twins_of(pair, called, training):
    """``called``: in both modes, so that both have packed and recorded."""
    fast, plain = pair()
    if called:
        for mode in (not training, training):
            fast.train(mode)(torch.randn(X)), plain.train(mode)(torch.randn(X))
        fast.load_state_dict(plain.state_dict())
    return fast, plain


def first(m, kind):
    return next(part for part in m.modules() if isinstance(part, kind))


def bound(function):
    return lambda module: types.MethodType(function, module)


def doubled_conv(self, x, weight, bias):
    return 2 * F.conv2d(x, weight, bias, self.stride, self.padding)


ON_INSTANCES = {
    "_conv_forward": (nn.Conv2d, "_conv_forward", bound(doubled_conv)),
    "forward of a convolution": (nn.Conv2d, "forward", bound(lambda self, x: x[:, :1].expand(-1, 16, -1, -1) * 2)),
    "forward of a norm": (nn.BatchNorm2d, "forward", bound(lambda self, x: x * 0.5)),
    "_check_input_dim": (nn.BatchNorm2d, "_check_input_dim", bound(lambda self, x: x.mul_(2))),
    "forward of a ReLU": (nn.ReLU, "forward", bound(lambda self, x: x.tanh())),
    "forward of a block": (reference.BasicBlock, "forward", bound(lambda self, x: x + self.bn1(self.conv1(x)))),
    "forward of a stage": (nn.Sequential, "forward", bound(lambda self, x: self[1](x) * 0.5)),
    "stem": (reference.CifarResNet, "stem", bound(lambda self, x: F.leaky_relu(self.bn1(self.conv1(x)), 0.3))),
    "features": (reference.CifarResNet, "features", bound(lambda self, x: self.layer3(self.layer2(self.stem(x))) * 2)),
    "forward of the network": (reference.CifarResNet, "forward", bound(lambda self, x: self.features(x).mean((2, 3)))),
}

# The class that is patched in both networks: for blocks and networks that of each, and the class behind it.
ON_CLASSES = {
    "_conv_forward": ([nn.Conv2d], "_conv_forward", doubled_conv),
    "forward of convolutions": (
        [nn.Conv2d],
        "forward",
        lambda self, x: self._conv_forward(x, self.weight, self.bias) * 0.9,
    ),
    "forward of norms": ([nn.BatchNorm2d], "forward", lambda self, x: x * 0.5),
    "forward behind norms": ([nn.modules.batchnorm._BatchNorm], "forward", lambda self, x: x * 0.5),
    "forward of ReLUs": ([nn.ReLU], "forward", lambda self, x: x.tanh()),
    "forward of Sequentials": ([nn.Sequential], "forward", lambda self, x: self[0](x) * 0.5),
    "forward of blocks": (
        [reference.BasicBlock, blocks.BasicBlock],
        "forward",
        lambda self, x: self.bn1(self.conv1(x)).tanh(),
    ),
    "forward behind blocks": ([reference.BasicBlock], "forward", lambda self, x: self.bn1(self.conv1(x)).tanh()),
    "stem": (
        [reference.CifarResNet, models.CifarResNet],
        "stem",
        lambda self, x: F.leaky_relu(self.bn1(self.conv1(x)), 0.3),
    ),
    "stem behind": ([reference.CifarResNet], "stem", lambda self, x: F.leaky_relu(self.bn1(self.conv1(x)), 0.3)),
    "features behind": (
        [reference.CifarResNet],
        "features",
        lambda self, x: self.layer3(self.layer2(self.layer1(self.stem(x)))) * 2,
    ),
    "flat_features behind": ([reference.CifarResNet], "flat_features", lambda self, x: self.features(x).amax((2, 3))),
    "flat behind": ([reference.CifarResNet], "flat", lambda self, y: y.amax((2, 3))),
}


def assert_same(ours, plain, training):
    """In float64, where nothing but what is computed decides."""
    x = torch.randn(X, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    results = []
    for m in (ours, plain):
        m.double().train(training).zero_grad()
        y = m(x)
        y.square().sum().backward()
        with torch.no_grad():
            results.append([y, m(x), *(p.grad for p in m.parameters())])
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-7)


def different(plain, x, change):
    """The patch changes what plain PyTorch gives: a test without that would find nothing."""
    with torch.no_grad():
        before = plain(x)
        change()
        return before.shape != plain(x).shape or not torch.allclose(before, plain(x))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("called", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("pair", [ours, fused])
@pytest.mark.parametrize("name", ON_INSTANCES)
def test_on_instances(name, pair, called, training):
    kind, method, make = ON_INSTANCES[name]
    fast, plain = twins_of(pair, called, training)
    place = first(fast, kind)
    setattr(place, method, make(place))

    def change():
        place = first(plain, kind)
        setattr(place, method, make(place))

    assert different(plain.eval(), torch.randn(X), change)
    assert_same(fast, plain, training)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("called", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("pair", [ours, fused])
@pytest.mark.parametrize("name", ON_CLASSES)
def test_on_classes(name, pair, called, training, monkeypatch):
    kinds, method, function = ON_CLASSES[name]
    fast, plain = twins_of(pair, called, training)

    def change():
        for kind in kinds:
            monkeypatch.setattr(kind, method, function)

    assert different(plain.eval(), torch.randn(X), change)
    assert_same(fast, plain, training)
    monkeypatch.undo()
    assert_same(fast, plain, training)

"""Small networks with their fused twins, for the tests of ``fuse``."""

import torch
from helpers.fuse_checks import prepared
from helpers.support import assert_same_model
from torch import nn

import resnet_fast
from resnet_fast import backends, reference
from resnet_fast.fusion.converted_module import ConvertedModule

X = (2, 3, 16, 16)


def pair():
    """A network of stem, stages and classifier, and what fuse makes of it."""
    torch.manual_seed(0)
    net = prepared(reference.CifarResNet(1))
    return resnet_fast.fuse(net), net


def blocks_pair(**kwargs):
    net = prepared(reference.Block(16, 16, 1, **kwargs))
    return resnet_fast.fuse(net), net


def fused_names(model):
    return [name for name, m in model.named_modules() if isinstance(m, ConvertedModule)]


def assert_fused(fused, net, x=None, method="__call__"):
    backends.fallbacks(clear=True)
    with backends.use("cpu"):
        return assert_same_model(fused, net, torch.randn(X) if x is None else x, method)


def conv(channels=8, out=8, kernel=3, **kwargs):
    return nn.Conv2d(channels, out, kernel, padding=kwargs.pop("padding", kernel // 2), **kwargs)


class Net(nn.Module):
    """Two layers with everything that a block may have; ``dataflow`` is its forward."""

    def __init__(self, dataflow, **parts):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(), nn.BatchNorm2d(8), conv(bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        for name, part in parts.items():
            setattr(self, name, part)
        self.dataflow = dataflow

    def forward(self, x):
        return self.dataflow(self, x)


def body(m, x):
    return m.bn2(m.conv2(m.relu(m.bn1(m.conv1(x)))))

"""Small networks with their fused twins, for the tests of ``fuse``."""

import torch
from helpers.fuse_checks import prepared
from helpers.support import assert_same_model

import resnet_fast
from resnet_fast import backends, reference
from resnet_fast.fusion.convert import ConvertedModule

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

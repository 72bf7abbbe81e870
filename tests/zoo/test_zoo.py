"""``fuse`` on networks of torchvision and timm, on a torch later than the one that the extension was built for."""

import pytest
import timm
import torch
import torchvision
from helpers.compiler_support import compiled, counts, graphs
from helpers.fuse_checks import check_network, prepared
from torch import nn

import resnet_fast
from resnet_fast import backends


def test_the_extension_of_an_earlier_torch():
    assert tuple(map(int, torch.__version__.split(".")[:2])) > (2, 13)
    assert backends.status()["cpu"].startswith("loaded")


class Maps(nn.Module):
    """A network up to its last maps: more numbers than a handful of scores."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        y = self.net(x)
        return y["out"] if isinstance(y, dict) else y


def vision(name, **kwargs):
    net = getattr(torchvision.models, name)(weights=None, **kwargs)
    for last in ("avgpool", "fc", "classifier"):
        if hasattr(net, last):
            setattr(net, last, nn.Identity())
    return net


def segmentation(name):
    return Maps(getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None))


def image_model(name):
    return timm.create_model(name, num_classes=0, global_pool="")


def timm_vgg(name):
    """Without its head, whose first convolution is 7 x 7 x 512 x 4096."""
    return timm.create_model(name, num_classes=0).features


# How to make it, the size of an image, how many convolutions are fused, of how many; training, too.
NETWORKS = {
    "resnet18": (lambda: vision("resnet18"), 48, (20, 20), True),
    "resnet50": (lambda: vision("resnet50"), 48, (53, 53), True),
    "wide_resnet50_2": (lambda: vision("wide_resnet50_2"), 40, (53, 53), False),
    "resnext50_32x4d": (lambda: vision("resnext50_32x4d"), 48, (37, 53), False),
    "vgg11_bn": (lambda: vision("vgg11_bn").features, 48, (8, 8), True),
    "densenet121": (lambda: vision("densenet121").features, 48, (117, 120), False),
    "googlenet": (lambda: vision("googlenet", aux_logits=False, init_weights=False), 48, (57, 57), True),
    "mobilenet_v2": (lambda: vision("mobilenet_v2").features, 48, (35, 52), False),
    "fcn_resnet50": (lambda: segmentation("fcn_resnet50"), 64, (47, 55), False),
    "timm resnet18": (lambda: image_model("resnet18"), 48, (20, 20), True),
    "timm resnet34": (lambda: image_model("resnet34"), 40, (36, 36), True),
    "timm resnet50": (lambda: image_model("resnet50"), 48, (53, 53), True),
    "timm resnet18d": (lambda: image_model("resnet18d"), 48, (22, 22), True),
    "timm resnet26d": (lambda: image_model("resnet26d"), 48, (31, 31), False),
    "timm resnext50_32x4d": (lambda: image_model("resnext50_32x4d"), 48, (37, 53), False),
    "timm vgg11_bn": (lambda: timm_vgg("vgg11_bn"), 48, (8, 8), True),
    "timm seresnet18": (lambda: image_model("seresnet18"), 48, (20, 36), True),
    "timm resnet50_gn": (lambda: image_model("resnet50_gn"), 48, (0, 53), False),
    "timm res2net50_26w_4s": (lambda: image_model("res2net50_26w_4s"), 48, (85, 85), False),
    "timm hrnet_w18_small": (lambda: image_model("hrnet_w18_small"), 64, (89, 91), False),
    # Batch norms with an activation in them, whose forward is timm's own.
    "timm regnetx_002": (lambda: image_model("regnetx_002"), 48, (31, 44), True),
    "timm resnetv2_50d": (lambda: image_model("resnetv2_50d"), 48, (51, 55), True),
    "timm densenet121": (lambda: image_model("densenet121"), 48, (117, 120), False),
    "timm cspresnet50": (lambda: image_model("cspresnet50"), 48, (55, 55), True),
    # Sums of branches; sizes that strides do not divide (support.NoWildGradients).
    "timm repvgg_a0": (lambda: image_model("repvgg_a0"), 65, (44, 44), True),
    "timm mobileone_s0": (lambda: image_model("mobileone_s0"), 65, (86, 191), True),
    "timm efficientnet_b0": (lambda: image_model("efficientnet_b0"), 65, (33, 81), True),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name):
    make, size, expected, training = NETWORKS[name]
    check_network(prepared(make()), torch.randn(2, 3, size, size), expected, training)


# Where code of the network goes through more than fuse reads, the compiler's graph has more.
MORE = {"timm hrnet_w18_small": 91}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_convolutions_in_a_compiled_graph(name):
    make, size, (fused, _), _ = NETWORKS[name]
    torch._dynamo.reset()
    with graphs() as seen, torch.no_grad():
        compiled(prepared(make()))(torch.randn(2, 3, size, size))
    assert counts(seen)[0] == MORE.get(name, fused)


def test_feature_extraction_of_torchvision():
    """It traces with torch.fx, and finds the original code."""
    from torchvision.models.feature_extraction import create_feature_extractor

    net = prepared(torchvision.models.resnet18(weights=None))
    nodes = {"layer1": "low", "layer4": "high"}
    theirs = create_feature_extractor(net, nodes)
    ours = create_feature_extractor(resnet_fast.fuse(net), nodes)
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        for a, b in zip(ours(x).values(), theirs(x).values(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    # What it makes is a graph with code of its own: left alone, by name.
    assert resnet_fast.fuse(theirs, inplace=True) is theirs
    assert resnet_fast.report(theirs).rows[0].detail == "a graph of torch.fx"

"""``fuse`` on networks of pytorchcv, which nobody here wrote: results, gradients, the report, state_dicts."""

from importlib import import_module

import pytest
import torch
from helpers.fuse_checks import check_inference, check_network, prepared
from torch import nn

import resnet_fast


def network(module, name, **kwargs):
    """Up to the last feature map, which shows more than a few scores, in a size that fits small images."""
    net = getattr(import_module(f"pytorchcv.models.{module}"), name)(**kwargs)
    if isinstance(getattr(net.features, "final_pool", None), nn.AvgPool2d):
        net.features.final_pool = nn.Flatten()
    net.output = nn.Identity()
    return prepared(net)


# Module and function of pytorchcv, the size of an image, how many convolutions are fused, of how many; training, too.
# One or two blocks of a kind: deeper networks repeat them (tests/zoo has those).
NETWORKS = [
    ("resnet", "resnet10", 48, (12, 12), True),
    ("resnet", "resnet18", 48, (20, 20), True),
    ("resnet", "resnetbc14b", 48, (17, 17), True),
    ("resnet_cifar", "resnet20_cifar10", 16, (21, 21), True),
    ("preresnet", "preresnet18", 40, (17, 20), True),
    ("preresnet_cifar", "preresnet20_cifar10", 16, (18, 21), False),
    ("wrn_cifar", "wrn16_10_cifar10", 12, (12, 16), False),
    ("densenet", "DenseNet", 32, (9, 10), False),
    # Grouped and dilated convolutions stay; the layers around them are fused.
    ("resnext", "resnext14_16x4d", 40, (13, 17), True),
    # Gates between the convolutions and the sum.
    ("seresnet", "seresnet10", 48, (12, 20), True),
    ("cbamresnet", "cbam_resnet18", 48, (28, 28), False),
    ("sknet", "SKNet", 32, (11, 15), False),
    ("diaresnet", "diaresnet10", 40, (12, 12), False),
    ("sharesnet", "sharesnet18", 40, (12, 16), False),
]


# Two stages of one or two blocks, of networks that pytorchcv has in full depth only.
SIZES = {
    "DenseNet": {"channels": [[96, 128]] * 2, "init_block_channels": 64},
    "SKNet": {"channels": [[64], [128]], "init_block_channels": 32},
}


@pytest.mark.parametrize(("module", "name", "size", "expected", "training"), NETWORKS, ids=[n[1] for n in NETWORKS])
def test_network(module, name, size, expected, training):
    check_network(network(module, name, **SIZES.get(name, {})), torch.randn(2, 3, size, size), expected, training)


def test_vgg():
    """Chains of two layers in a Sequential, between pools; ``view`` of the result wants eager's memory format."""
    from pytorchcv.models.vgg import bn_vgg11

    with torch.device("meta"):  # without the 120 million weights of its classifier
        features = bn_vgg11().features
    features = features.to_empty(device="cpu")
    for m in features.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight)
        elif isinstance(m, nn.BatchNorm2d):
            m.reset_parameters()
    fused = check_network(prepared(features), torch.randn(2, 3, 32, 32), (8, 8), training=True)
    rows = [(row.name, row.layers) for row in resnet_fast.report(fused).rows if row.status == "fused"]
    assert rows == [("stage1.unit1", 1), ("stage2.unit1", 1), ("stage3", 2), ("stage4", 2), ("stage5", 2)]
    with torch.no_grad():
        assert fused(torch.randn(2, 3, 64, 64)).view(2, -1).shape == (2, 2048)


def test_segmentation_with_a_dilated_backbone():
    from pytorchcv.models.fcn8sd import fcn8sd_resnetd50b_voc

    net = prepared(fcn8sd_resnetd50b_voc(aux=False, in_size=(48, 48), num_classes=5))
    dilated = sum(isinstance(m, nn.Conv2d) and m.dilation != (1, 1) for m in net.modules())
    fused = resnet_fast.fuse(net)
    rows = [row for row in resnet_fast.report(fused).rows if row.status == "not fused"]
    assert sum("dilation" in row.detail for row in rows) == dilated == 8
    assert len(rows) == dilated
    check_inference(net, fused, torch.randn(1, 3, 48, 48))

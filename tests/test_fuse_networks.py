"""``fuse`` on networks of pytorchcv, which nobody here wrote: results, gradients, the report, state_dicts."""

from importlib import import_module

import pytest
import torch
from fuse_checks import check_network, prepared
from torch import nn


def network(module, name, **kwargs):
    """Up to the last feature map, which tells more than a handful of scores, in a size that fits small images."""
    net = getattr(import_module(f"pytorchcv.models.{module}"), name)(**kwargs)
    if isinstance(getattr(net.features, "final_pool", None), nn.AvgPool2d):
        net.features.final_pool = nn.Flatten()
    net.output = nn.Identity()
    return prepared(net)


# Module and function of pytorchcv, the size of an image, how many convolutions are fused, of how many; training, too.
NETWORKS = [
    ("resnet", "resnet10", 48, (12, 12), True),
    ("resnet", "resnet18", 48, (20, 20), True),
    ("resnet", "resnet34", 40, (36, 36), False),
    ("resnet", "resnet50", 48, (53, 53), True),
    ("resnet_cifar", "resnet20_cifar10", 16, (21, 21), True),
    ("resnet_cifar", "resnet56_cifar10", 16, (57, 57), False),
    ("preresnet", "preresnet18", 40, (17, 20), True),
    ("preresnet_cifar", "preresnet20_cifar10", 16, (18, 21), False),
    ("wrn_cifar", "wrn16_10_cifar10", 12, (12, 16), False),
    ("densenet", "densenet121", 32, (117, 120), False),
    # Grouped and dilated convolutions stay, what is around them is fused.
    ("resnext", "resnext14_16x4d", 40, (13, 17), True),
    ("resnetd", "resnetd50b", 40, (47, 55), False),
    # Gates between the convolutions and the sum.
    ("seresnet", "seresnet10", 48, (12, 20), True),
    ("cbamresnet", "cbam_resnet18", 48, (28, 28), False),
    ("sknet", "sknet50", 32, (69, 101), False),
    ("diaresnet", "diaresnet10", 40, (12, 12), False),
    ("sharesnet", "sharesnet18", 40, (12, 16), False),
]


@pytest.mark.parametrize(("module", "name", "size", "expected", "training"), NETWORKS, ids=[n[1] for n in NETWORKS])
def test_network(module, name, size, expected, training):
    check_network(network(module, name), torch.randn(2, 3, size, size), expected, training)

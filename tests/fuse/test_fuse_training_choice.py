"""``fuse`` in training mode: a 1x1 convolution alone is left to PyTorch; every other chain is fused."""

import pytest
import torch
from helpers.feature_support import counted
from helpers.fuse_checks import check_network, prepared
from torch import nn

import resnet_fast
from resnet_fast import backends, reference


def layer(inputs, outputs, kernel, act, stride=1):
    norm = nn.BatchNorm2d(outputs)
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), norm, act())


class Inverted(nn.Module):
    """The block of MobileNet and EfficientNet."""

    def __init__(self, act=nn.SiLU):
        super().__init__()
        self.expand, self.project = layer(8, 16, 1, act), layer(16, 8, 1, nn.Identity)
        self.depthwise = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), act()
        )

    def forward(self, x):
        return x + self.project(self.depthwise(self.expand(x)))


def chains(net, training):
    """Convolutions in the chains that a call runs; none of it is a fallback."""
    with counted() as runs, backends.use("cpu"):
        net.train(training)(torch.randn(2, 8, 9, 9))
    assert backends.fallbacks() == {}
    return [len(run.pairs) for run in runs]


@pytest.mark.parametrize("act", [nn.SiLU, nn.ReLU])
def test_a_small_convolution_alone(act):
    fused = check_network(prepared(Inverted(act)), torch.randn(2, 8, 9, 9), (2, 3))
    assert (chains(fused, False), chains(fused, True)) == ([1, 1], [])
    rows = [row.detail for row in resnet_fast.report(fused).rows if row.status == "fused"]
    assert len(rows) == 2
    assert all("not in training mode: a 1x1 convolution alone does not pay in training mode" in row for row in rows)


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (layer(8, 8, 3, nn.ReLU), [1]),
        (layer(8, 8, 3, nn.SiLU, 2), [1]),
        (nn.Sequential(layer(8, 16, 1, nn.ReLU), layer(16, 8, 1, nn.ReLU)), [2]),
        (reference.Bottleneck(8, 4, 2), [4]),
        (reference.BasicBlock(8, 16, 2), [3]),
    ],
    ids=["3x3", "strided", "two", "bottleneck", "basic block"],
)
def test_other_runs(net, expected):
    fused = resnet_fast.fuse(prepared(net))
    assert chains(fused, False) == chains(fused, True) == expected


class OwnAffairs(nn.Module):
    """In training mode the sum is in no chain; each of its operands runs fused by itself."""

    def __init__(self):
        super().__init__()
        self.small, self.large = layer(8, 8, 1, nn.Identity), layer(8, 8, 3, nn.Identity)

    def forward(self, x):
        return torch.sigmoid(self.small(x) + self.large(x))


def test_modules_inside_of_what_is_fused_in_eval_mode_alone():
    fused = check_network(prepared(OwnAffairs()), torch.randn(2, 8, 9, 9), (2, 2))
    assert (chains(fused, False), chains(fused, True)) == ([2], [1])

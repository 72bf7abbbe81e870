"""What no kernel takes runs on PyTorch's own operators, and the report says so."""

from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from helpers.support import OPS
from torch import nn

import resnet_fast
from resnet_fast import backends, blocks, ops
from resnet_fast.ops import arguments


@pytest.mark.parametrize("kernel", [(1, 1025), (33, 32), (1025, 1)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_filters_of_many_taps_run_unfused(op, kernel):
    height, width = kernel
    x, weight = torch.randn(1, 2, height + 1, width + 2), torch.randn(3, 2, *kernel)
    y = F.conv2d(x, weight)
    residual = [torch.randn_like(y)] if op == "conv_bn_add_relu" else []
    out = getattr(ops, op)(x, *residual, weight)
    y = y + residual[0] if residual else y
    assert torch.equal(out, y if op == "conv_bn" else y.relu())
    assert backends.fallbacks() == {f"{op}: a filter of {height} x {width}, more than 1024 taps": 1}
    with backends.use("cpu"), pytest.raises(RuntimeError, match="more than 1024 taps"):
        getattr(ops, op)(x, *residual, weight)


def test_filters_of_as_many_taps_as_there_may_be():
    x, weight = torch.randn(1, 2, 3, 1030), torch.randn(3, 2, 1, arguments.MOST_TAPS)
    with backends.use("cpu"):
        y = ops.conv_bn(x, weight)
    assert torch.allclose(y, F.conv2d(x, weight), atol=1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_the_report_says_what_runs(training):
    convolutions = (nn.Conv2d(3, 4, (1, 1025)), nn.Conv2d(4, 4, 1))
    layers = [layer for conv in convolutions for layer in (conv, nn.BatchNorm2d(4), nn.ReLU())]
    net = resnet_fast.fuse(nn.Sequential(*layers).train(training))
    report = resnet_fast.report(net)
    assert (report.fused, report.layers) == (1, 2)
    assert "0        Conv2d      not fused  a filter of 1 x 1025, more than 1024 taps" in str(report)
    net(torch.randn(2, 3, 2, 1030))
    assert backends.fallbacks() == {}  # what cannot run fused is no part of what does


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(8, 8, (1, 1025), 1, (0, 512), bias=False), "a filter of 1 x 1025, more than 1024 taps"),
        (nn.Conv2d(8, 8, 3, 1, 2, dilation=2, bias=False), "dilation (2, 2)"),
    ],
    ids=["taps", "dilation"],
)
def test_the_report_of_a_block_that_falls_back(conv, reason):
    block = blocks.BasicBlock(8, 8).eval()
    assert resnet_fast.report(block).fused == 2
    block.conv1 = conv
    report = resnet_fast.report(block)
    assert report.fused == 0
    assert [(row.name, row.status, row.detail) for row in report.rows] == [
        ("", "not fused", reason),
        ("conv1", "not fused", reason),
        ("conv2", "not fused", "part of a BasicBlock that is not fused"),
    ]
    block(torch.randn(1, 8, 6, 6))
    assert backends.fallbacks() == {f"BasicBlock: {reason}": 1}


@pytest.mark.parametrize("training", [False, True])
def test_a_negative_eps_is_left_to_pytorch(training):
    block = blocks.BasicBlock(8, 8).train(training)
    block.bn1.eps = -1.0
    with suppress(RuntimeError, ValueError):  # of PyTorch, whose later releases refuse it
        block(torch.randn(2, 8, 6, 6))
    assert backends.fallbacks() == {"BasicBlock: a batch norm with eps -1.0": 1}

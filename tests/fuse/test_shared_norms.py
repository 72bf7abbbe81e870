"""Batch norms that a forward calls more than once: statistics follow one another as in plain PyTorch."""

import pytest
import torch
from helpers.fuse_checks import prepared
from torch import nn

import resnet_fast
from resnet_fast import reference

SHAPE = (3, 8, 7, 9)


def block_twice(module):
    stage = nn.Sequential(module.BasicBlock(8, 8, 1), module.BasicBlock(8, 8, 1))
    stage.append(stage[0])
    return stage


def norm_twice_in_a_block(module):
    block = module.BasicBlock(8, 8, 1)
    block.bn2 = block.bn1
    return block


def norm_of_two_blocks(module):
    stage = nn.Sequential(module.BasicBlock(8, 8, 1), module.BasicBlock(8, 8, 1), module.BasicBlock(8, 8, 1))
    stage[1].bn2 = stage[0].bn1
    stage[2].bn1 = stage[0].bn1
    return stage


def one_block_in_two_stages(module):
    block = module.BasicBlock(8, 8, 1)
    return nn.Sequential(nn.Sequential(module.BasicBlock(8, 8, 1), block), nn.Sequential(block, block))


def all_layers_shared(module):
    first, second = module.BasicBlock(8, 8, 1), module.BasicBlock(8, 8, 1)
    for name in ("conv1", "bn1", "conv2", "bn2", "relu"):
        setattr(second, name, getattr(first, name))
    return nn.Sequential(first, second)


CASES = (block_twice, norm_twice_in_a_block, norm_of_two_blocks, one_block_in_two_stages, all_layers_shared)


def ours(make):
    from resnet_fast import blocks

    plain = prepared(make(reference))
    fast = make(blocks)
    fast.load_state_dict(plain.state_dict())
    return fast, plain


def fused(make):
    plain = prepared(make(reference))
    return resnet_fast.fuse(plain), plain


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("pair", [ours, fused])
@pytest.mark.parametrize("make", CASES)
def test_statistics_and_gradients(make, pair, momentum):
    torch.manual_seed(0)
    nets = [m.double().train() for m in pair(make)]
    for m in nets:
        for norm in m.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = momentum
    for step in range(3):
        x = torch.randn(SHAPE, dtype=torch.float64) * (step + 1)
        results = []
        for m in nets:
            m.zero_grad()
            y = m(x)
            y.square().sum().backward()
            results.append({"y": y, **{k: p.grad for k, p in m.named_parameters()}, **dict(m.named_buffers())})
        torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)
    x = torch.randn(SHAPE, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(nets[0].eval()(x), nets[1].eval()(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("pair", [ours, fused])
@pytest.mark.parametrize("make", CASES)
def test_batches_are_counted_as_often_as_they_pass(make, pair):
    for m in (nets := pair(make)):
        m.train()
        for _ in range(2):
            m(torch.randn(SHAPE))
    counts = [{k: int(v) for k, v in m.named_buffers() if k.endswith("num_batches_tracked")} for m in nets]
    assert counts[0] == counts[1]
    assert max(counts[0].values()) > 2

"""Fused training as a part of autograd: which gradients, how often, in which dtype, and what raises."""

import pytest
import torch
from helpers.support import (
    twins,
)
from helpers.training_support import assert_trains_as_eager
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fast import backends, blocks, reference

KINDS = ("Block", "BasicBlock", "Bottleneck")


@pytest.mark.parametrize("frozen", ["x", "everything but x", "batch norms", "all but one", "a stage's first block"])
def test_only_the_gradients_that_are_asked_for(frozen):
    twin = twins(lambda: nn.Sequential(*[blocks.BasicBlock(16, 16) for _ in range(2)]), make_sequential)
    x = torch.randn(2, 16, 6, 6)
    leaves = []
    for m in (blocks.Stage(*twin[0]), twin[1]):
        m.train()
        first, second = m
        if frozen == "everything but x":
            m.requires_grad_(False)
        elif frozen == "batch norms":
            for part in m.modules():
                part.requires_grad_(not isinstance(part, nn.BatchNorm2d))
        elif frozen == "all but one":
            m.requires_grad_(False)
            second.conv2.weight.requires_grad_(True)
        elif frozen == "a stage's first block":
            first.requires_grad_(False)
        own = x.clone().requires_grad_(frozen not in ("x", "a stage's first block", "all but one"))
        m(own).square().mean().backward()
        leaves.append([own.grad, *(p.grad for p in m.parameters())])
    assert backends.fallbacks() == {}
    for ours, theirs in zip(*leaves, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6)


def make_sequential():
    return nn.Sequential(*[reference.BasicBlock(16, 16) for _ in range(2)])


class Calls(TorchDispatchMode):
    """The arguments of each call of an operator."""

    def __init__(self, name):
        super().__init__()
        self.name, self.found = name, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.startswith(self.name + "."):
            self.found.append(args)
        return func(*args, **(kwargs or {}))


def test_no_work_for_gradients_that_nobody_needs():
    m = blocks.Stage(blocks.BasicBlock(8, 8), blocks.BasicBlock(8, 8)).train()
    x = torch.randn(2, 8, 6, 6)
    m[0].requires_grad_(False)
    with Calls("conv_backward") as calls:
        m(x).sum().backward()
    needs = [(args[10], args[11]) for args in calls.found]
    assert needs == [(True, True), (False, True)]  # of x and of the weight; the second block's convolutions alone
    m.requires_grad_(False)
    with Calls("conv_backward") as calls:
        m(x.requires_grad_()).sum().backward()
    assert [(args[10], args[11]) for args in calls.found] == [(True, False)] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_share_no_memory(kind):
    """Clipping and unscaling change them in place, one by one."""
    m = getattr(blocks, kind)(16, 8, 2).train()
    x = torch.randn(2, 16, 6, 6, requires_grad=True)
    m(x).sum().backward()
    grads = [x.grad, *(p.grad for p in m.parameters())]
    assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads)


def test_accumulation():
    fast, eager = twins(blocks.BasicBlock, reference.BasicBlock, 8, 8)
    halves = torch.randn(4, 8, 6, 6).chunk(2)
    for m in (fast, eager):
        m.train()
        for half in halves:
            m(half).square().mean().backward()
    for ours, theirs in zip(fast.parameters(), eager.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    fast, eager = twins(getattr(blocks, kind), getattr(reference, kind), 16, 24, 2)
    ours = assert_trains_as_eager(fast, eager, torch.randn(3, 16, 9, 7), autocast=True)
    assert ours["output"].dtype == torch.bfloat16
    assert ours["conv1.weight"].dtype == torch.float32


def test_grad_scaler():
    results = []
    for m in twins(blocks.BasicBlock, reference.BasicBlock, 8, 8):
        m.train()
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**10), torch.optim.SGD(m.parameters(), lr=0.1)
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):
            loss = m(torch.randn(4, 8, 6, 6)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        results.append(list(m.parameters()))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("what", ["conv1.weight", "bn1.weight", "bn2.bias", "x", "output"])
def test_changes_in_place_before_the_backward_pass_raise(what):
    m = blocks.Block(16, 16, 1).train()
    x = torch.randn(2, 16, 6, 6).to(memory_format=torch.channels_last)  # of another layout, a copy is kept
    y = m(x)
    with torch.no_grad():
        {"x": x, "output": y}.get(what, dict(m.named_parameters()).get(what)).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice():
    m = blocks.BasicBlock(8, 8).train()
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    loss = m(x).sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()

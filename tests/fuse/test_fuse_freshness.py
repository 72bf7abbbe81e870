"""Fused modules follow what is done to them between two calls, and code that depends on more than tensors."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers.changes import FUSED_AFTERWARDS, UNFUSED_AFTERWARDS, check
from helpers.fuse_checks import prepared
from helpers.fuse_support import X, assert_fused, blocks_pair, fused_names, pair
from helpers.support import assert_same_model
from torch import nn

import resnet_fast
from resnet_fast import backends, reference

OTHER_CODE = "another value of Block.downsample"  # a None when the code was traced
FALLS_BACK_HERE = {"projection added", "projection without norm", "stride"}


@pytest.mark.parametrize("name", FUSED_AFTERWARDS)
@torch.no_grad()
def test_changes_afterwards_are_seen(name):
    fused, net = blocks_pair()
    x = torch.randn(2, 16, 7, 7)
    fused.train().eval()
    check(fused, net, FUSED_AFTERWARDS[name], x)
    if name in FALLS_BACK_HERE:
        backends.fallbacks(clear=True)
        assert_same_model(fused, net, x)
        assert list(backends.fallbacks()) == [f"FusedBlock: {OTHER_CODE}"]
    else:
        assert_fused(fused, net, x)


@pytest.mark.parametrize("name", UNFUSED_AFTERWARDS)
@torch.no_grad()
def test_changes_that_end_the_fusion(name):
    fused, net = blocks_pair(dropout=0.5)
    x = torch.randn(2, 16, 7, 7)
    change, reason = UNFUSED_AFTERWARDS[name]
    after = check(fused, net, change, x)
    torch.manual_seed(0)
    assert torch.equal(after, net(x))
    reason = OTHER_CODE if name.startswith("projection") else reason
    assert any(k.startswith("FusedBlock: ") and reason in k for k in backends.fallbacks()), backends.fallbacks()


class Switch(nn.Module):
    """Code that depends on attributes."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.activation, self.scale, self.options = F.relu, 1.0, {"add": False}

    def forward(self, x):
        y = self.activation(self.bn(self.conv(x)))
        return y + x if self.options["add"] else y * self.scale if self.scale != 1 else y


@pytest.mark.parametrize(
    ("attribute", "value", "fused_after"),
    [("scale", 2.0, False), ("scale", 1.0, True), ("activation", torch.tanh, False), ("options", {"add": True}, False)],
)
@pytest.mark.parametrize("training", [False, True])
def test_attributes_that_the_code_depends_on(attribute, value, fused_after, training):
    net = prepared(Switch()).train(training)
    fused = resnet_fast.fuse(net)
    x = torch.randn(2, 4, 6, 6)
    fused(x)
    assert backends.fallbacks() == {}
    for m in (fused, net):
        setattr(m, attribute, value)
    assert torch.allclose(fused(x), net(x), rtol=1e-4, atol=1e-5)
    expected = {} if fused_after else {f"FusedSwitch: another value of Switch.{attribute}": 1}
    assert backends.fallbacks() == expected


def test_a_mode_in_which_the_code_does_something_else():
    class Depth(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = reference.BasicBlock(4, 4)

        def forward(self, x):
            y = self.block(x)
            return y * torch.bernoulli(torch.full((1,), 0.5)) if self.training else y

    net = prepared(Depth())
    fused = resnet_fast.fuse(net)
    x = torch.randn(2, 4, 6, 6)
    assert_fused(fused, net, x)
    for m in (fused, net):
        m.train()
    torch.manual_seed(1)
    y = fused(x)
    torch.manual_seed(1)
    assert torch.allclose(y, net(x), rtol=1e-4, atol=1e-5)
    assert [k.partition(":")[0] for k in backends.fallbacks()] == ["FusedDepth"]  # the block inside is fused


def test_other_arguments():
    class Scaled(reference.BasicBlock):
        def forward(self, x, factor=None):
            y = super().forward(x)
            return y if factor is None else y * factor

    net = prepared(Scaled(4, 4))
    fused, x = resnet_fast.fuse(net), torch.randn(2, 4, 6, 6)
    for args, kwargs, reasons in [
        ((), {"x": x}, {}),
        ((x, None), {}, {}),
        ((x, 2.0), {}, {"FusedScaled: called with other arguments than it was traced with": 1}),
    ]:
        assert torch.allclose(fused(*args, **kwargs), net(*args, **kwargs), rtol=1e-4, atol=1e-5)
        assert backends.fallbacks(clear=True) == reasons
    with pytest.raises(TypeError):
        fused()
    assert list(inspect.signature(fused.forward).parameters) == ["x", "factor"]


class Shortcut(nn.Module):
    """A block whose caller may pass the shortcut, as in aggregated networks."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x, shortcut=None, scale=None):
        shortcut = x if shortcut is None else shortcut
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + shortcut
        return torch.relu(y) if scale is None else torch.relu(y * scale)


class Tree(nn.Module):
    """Two of them, one of which gets a shortcut; it is unfused itself: ``children`` may be the list of its caller."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Shortcut(), Shortcut()

    def forward(self, x, children=None):
        children = [] if children is None else children
        children.append(x)
        return self.second(self.first(x), children[0])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "call",
    [
        lambda m, x, y: m(x, y),
        lambda m, x, y: m(x, shortcut=y),
        lambda m, x, y: m(shortcut=y, x=x),
        lambda m, x, y: m(x, None, y),
        lambda m, x, y: m(x, y, scale=y),
        lambda m, x, y: m(x, y) + m(x) + m(x, scale=y),
    ],
)
def test_tensors_in_the_place_of_none(call, training):
    net = prepared(Shortcut())
    fused = resnet_fast.fuse(net)
    x, y = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6)
    for m in (net, fused):
        m.double().train(training)
    for _ in range(2):
        results = []
        for m in (net, fused):
            m.zero_grad()
            out = call(m, x.double(), y.double())
            out.square().sum().backward()
            results.append([out, *(p.grad for p in m.parameters()), *m.buffers()])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
        fused = pickle.loads(pickle.dumps(copy.deepcopy(fused)))
    assert backends.fallbacks() == {}


def test_a_tree_of_blocks():
    net = prepared(Tree())
    fused = resnet_fast.fuse(net)
    assert fused_names(fused) == ["first", "second"]
    with backends.use("cpu"), torch.no_grad():
        assert_fused(fused, net, torch.randn(2, 8, 6, 6))
    assert backends.fallbacks() == {}


def test_a_variant_follows_what_changes():
    net = prepared(Shortcut())
    fused = resnet_fast.fuse(net)
    x, y = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        for change in (lambda m: m.conv2.weight.mul_(2), lambda m: setattr(m, "bn2", nn.Identity())):
            assert torch.allclose(fused(x, y), net(x, y), rtol=1e-4, atol=1e-4)
            change(net), change(fused)
            assert torch.allclose(fused(x, y), net(x, y), rtol=1e-4, atol=1e-4)


def test_hooks():
    """On a block: it stays fused, its stage does not. Inside of a block: the block falls back. Without: all fused."""
    fused, net = pair()
    x, seen = torch.randn(X), {}

    def keep(name):
        return lambda m, args, y: seen.__setitem__(name, y)

    handles = [m.layer2[0].register_forward_hook(keep(i)) for i, m in enumerate((fused, net))]
    with torch.no_grad():
        fused(x), net(x)
        assert torch.allclose(seen[0], seen[1], rtol=1e-4, atol=1e-5)
        assert backends.fallbacks(clear=True) == {"FusedSequential: a hook on a FusedBasicBlock": 1}
        handles.append(fused.layer1[0].conv2.register_forward_hook(keep("conv")))
        fused(x)
        assert "conv" in seen
        assert "FusedBasicBlock: a hook on a Conv2d" in backends.fallbacks()
    for handle in handles:
        handle.remove()
    assert_fused(fused, net)
    hooked = copy.deepcopy(net)
    hooked.layer1[0].conv2.register_forward_hook(keep("later"))
    rows = {row.name: row.detail for row in resnet_fast.report(resnet_fast.fuse(hooked, inplace=True)).rows}
    assert rows["layer1.0.conv2"] == "a hook on a Conv2d"

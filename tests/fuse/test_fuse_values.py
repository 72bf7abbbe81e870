"""What the code around fused chains sees: its values, names and modes are those of the original forward."""

import gc
import operator

import pytest
import torch
import torch.nn.functional as F
from helpers.fuse_checks import check_inference, check_training, prepared
from helpers.fuse_support import Net, body
from torch import nn

import resnet_fast
from resnet_fast import backends


def test_values_are_let_go_once_nobody_reads_them():
    """As in the original code, not at the end of the forward."""
    alive = []

    def dataflow(m, x):
        y = m.relu(m.bn1(m.conv1(x)))
        y = F.avg_pool2d(y, 1)
        y = m.note(F.max_pool2d(y, 1))
        return m.bn2(m.conv2(y)).sin()

    class Note(nn.Module):
        def forward(self, y):
            gc.collect()
            tensors = [
                t for t in gc.get_objects() if isinstance(t, torch.Tensor) and not t.is_nested
            ]  # nested: no shape
            alive.append(sum(t.shape == (3, 8, 11, 13) for t in tensors))
            del tensors
            return y

    net = prepared(Net(dataflow, note=Note()))
    fused = resnet_fast.fuse(net)
    with torch.no_grad():
        for m in (net, fused):
            m(torch.randn(3, 8, 11, 13))
    assert alive[1] <= alive[0], alive


@pytest.mark.parametrize(
    "change",
    [lambda m, y, x: F.relu6(y, inplace=True), lambda m, y, x: y.mul_(2), lambda m, y, x: operator.iadd(y, x.sin())],
    ids=["activation", "mul_", "+="],
)
def test_what_comes_out_may_be_changed_in_place(change):
    net = prepared(Net(lambda m, x: change(m, m.bn1(m.conv1(x)), x)))
    del net.conv2, net.bn2
    fused = resnet_fast.fuse(net)
    assert resnet_fast.report(fused).fused == 1
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)  # as the kernels give it: nothing is copied
    check_inference(net, fused, x, factor=3)
    check_training(net, fused, x)


def test_methods_and_attributes_of_any_name():
    """The subclass must not hide what its class calls."""

    class Named(Net):
        def forward(self, x):
            return self._forward(x)

        def _forward(self, x):
            return self._fused(x, self.plan)

        def _fused(self, x, plan):
            return body(self, x) * plan

    net = prepared(Named(None, plan=2.0))
    fused, x = resnet_fast.fuse(net), torch.randn(2, 8, 6, 6)
    names = set(dir(type(fused))) - set(dir(Named))
    assert names == {"__prepare_scriptable__", "_resnet_fast", "fused_from"}
    with torch.no_grad():
        assert torch.allclose(fused(x), net(x), rtol=1e-4, atol=1e-5)
        with backends.use("eager"):
            assert torch.equal(fused(x), net(x))
        assert torch.allclose(fused(x=x), net(x), rtol=1e-4, atol=1e-5)


def kept(m, x):
    y = m.relu(m.bn1(m.conv1(x)))
    return m.bn2(m.conv2(y)) + y.sin()


def changes_input(m, x):
    y = body(m, x)
    x += y
    return m.relu(x)


@pytest.mark.parametrize(("dataflow", "chains"), [(kept, 2), (changes_input, 1)])
def test_values_that_others_see(dataflow, chains):
    """Values that other code or the caller reads must be there."""
    net = prepared(Net(dataflow))
    fused = resnet_fast.fuse(net)
    assert len(fused._resnet_fast.plans[False].segments) == chains
    results = []
    for m in (fused, net):
        x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            results.append((m(x), x))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


class Dropping(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


def test_parts_in_another_mode():
    """The dropout is a function that takes the mode of the module around it."""
    net = prepared(Net(lambda m, x: m.bn2(m.conv2(m.drop(m.bn1(m.conv1(x))))), drop=Dropping()))
    fused, x = resnet_fast.fuse(net), torch.randn(2, 8, 6, 6)
    check_inference(net, fused, x, factor=3)
    for m in (fused, net):
        m.drop.train()
    results = []
    for m in (fused, net):
        torch.manual_seed(1)
        results.append(m(x))
    assert torch.equal(*results)
    assert backends.fallbacks() == {"FusedNet: parts of it are in another mode": 1}

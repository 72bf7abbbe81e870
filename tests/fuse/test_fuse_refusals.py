"""``fuse`` on small modules: what is left alone, and why."""

import re

import pytest
import torch
from helpers.fuse_checks import prepared
from helpers.fuse_support import Net, body, conv
from torch import nn
from torch.utils.checkpoint import checkpoint

import resnet_fast


def branch(m, x):
    return m.relu(m.bn1(m.conv1(x))) if x.mean() > 0 else x


def counting(m, x):
    m.calls += 1
    return body(m, x)


def remembering(m, x):
    m.last = m.conv1(x)
    return m.relu(m.bn1(m.last))


def accumulating(m, x):
    m.sum.mul_(2)
    return body(m, x)


def noisy(m, x):
    return body(m, x) + torch.rand(1).item()


def without_gradients(m, x):
    with torch.no_grad():
        y = m.bn1(m.conv1(x))
    return m.relu(y)


def asks_for_gradients(m, x):
    return body(m, x) if torch.is_grad_enabled() else x


def twice(m, x):
    return m.bn1(m.conv1(m.bn1(m.conv1(x))))


def pre_norm(m, x):
    y = m.conv1(x)
    return m.relu(m.bn1(y)) + y


def writes_in_between(m, x):
    """The convolution reads ``x`` before it changes."""
    x = x.clone()
    y = m.conv1(x)
    x += 1
    return m.relu(m.bn1(y)) + x


# Of the first convolution: nothing is fused with it, for this reason.
LEFT = {
    "groups": (lambda m, x: m.relu(m.bn1(m.conv1(x))), {"conv1": conv(groups=2)}, "2 groups"),
    "dilation": (lambda m, x: m.relu(m.bn1(m.conv1(x))), {"conv1": conv(dilation=2)}, r"dilation \(2, 2\)"),
    "padding mode": (body, {"conv1": conv(padding_mode="reflect")}, "padding mode 'reflect'"),
    "uneven padding": (body, {"conv1": nn.Conv2d(8, 8, 2, padding="same")}, "uneven padding"),
    "no norm": (lambda m, x: m.relu(m.conv1(x)), {}, r"ReLU \(relu\) behind it"),
    "group norm": (lambda m, x: m.bn1(m.conv1(x)), {"bn1": nn.GroupNorm(2, 8)}, r"GroupNorm \(bn1\) behind it"),
    "control flow": (branch, {}, "its forward cannot be traced: symbolically traced variables"),
    "shape": (lambda m, x: m.bn1(m.conv1(x)) if x.shape[1] == 8 else x, {}, "its forward cannot be traced"),
    "attributes": (counting, {"calls": 0}, "it sets m.calls"),
    "attributes with values": (remembering, {}, "it sets m.last"),
    "a tensor in place": (accumulating, {"sum": torch.ones(())}, "it reads Net.sum, a Tensor"),
    "random numbers": (noisy, {}, "it calls torch.rand"),
    "no_grad": (without_gradients, {}, "it has a statement 'with'"),
    "autocast": (lambda m, x: torch.autocast("cpu")(body)(m, x), {}, "it calls torch.autocast"),
    "checkpoint": (
        lambda m, x: checkpoint(lambda x: body(m, x), x, use_reentrant=False),
        {},
        "it calls torch.utils.checkpoint.checkpoint",
    ),
    "grad mode": (asks_for_gradients, {}, "it calls torch.is_grad_enabled"),
    "called twice": (twice, {}, "called more than once"),
    "in place in between": (writes_in_between, {}, "something is changed in place in between"),
    "norm elsewhere": (pre_norm, {}, "its result is used before the batch norm, too"),
    "own tensor": (lambda m, x: body(m, x) + torch.ones(8, 1, 1), {}, "it calls torch.ones"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone_is_named_with_the_reason(name):
    dataflow, parts, reason = LEFT[name]
    net = prepared(Net(dataflow, **parts))
    before = {n: dict(vars(m)) for n, m in net.named_modules()}
    state = torch.random.get_rng_state()
    fused = resnet_fast.fuse(net, inplace=True)
    assert fused is net
    assert torch.equal(torch.random.get_rng_state(), state)
    rows = {row.name: row for row in resnet_fast.report(fused).rows}
    assert rows["conv1"].status == "not fused"
    assert re.search(reason, rows["conv1"].detail), rows["conv1"]
    assert not hasattr(net, "sum") or net.sum == 1
    if type(net) is Net:
        for n, m in net.named_modules():
            assert vars(m).keys() == before[n].keys()
            assert all(vars(m)[key] is value for key, value in before[n].items())
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        torch.manual_seed(3)
        y = fused(x.clone())
        torch.manual_seed(3)
        assert torch.allclose(y, resnet_fast.unfuse(fused)(x.clone()), rtol=1e-4, atol=1e-5)


class Closed(Net):
    def __init_subclass__(cls, **kwargs):
        raise TypeError("no subclasses")


def test_a_class_that_cannot_be_extended():
    net = prepared(Closed(body))
    rows = {row.name: row.detail for row in resnet_fast.report(resnet_fast.fuse(net, inplace=True)).rows}
    assert type(net) is Closed
    assert rows[""] == "a class that cannot be extended: no subclasses"


def test_a_convolution_that_two_modules_share():
    shared = conv()
    net = prepared(nn.Sequential(*(nn.Sequential(shared, nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2))))
    fused = resnet_fast.fuse(net)
    rows = {row.name: row.detail for row in resnet_fast.report(fused).rows}
    assert rows["0.0"] == "shared with another module"
    assert resnet_fast.report(fused).fused == 0

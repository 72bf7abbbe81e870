"""``fuse`` on small modules: what is the pattern, what is not, and why."""

import copy
import gc
import operator
import re

import pytest
import torch
import torch.nn.functional as F
from helpers.fuse_checks import check_inference, check_left_alone, check_training, prepared
from torch import nn
from torch.utils.checkpoint import checkpoint

import resnet_fast
from resnet_fast import backends, reference
from resnet_fast.fusion.convert import ConvertedModule


def conv(channels=8, out=8, kernel=3, **kwargs):
    return nn.Conv2d(channels, out, kernel, padding=kwargs.pop("padding", kernel // 2), **kwargs)


class Net(nn.Module):
    """Two layers with everything that a block may have; ``dataflow`` is its forward."""

    def __init__(self, dataflow, **parts):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv(), nn.BatchNorm2d(8), conv(bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        for name, part in parts.items():
            setattr(self, name, part)
        self.dataflow = dataflow

    def forward(self, x):
        return self.dataflow(self, x)


def body(m, x):
    return m.bn2(m.conv2(m.relu(m.bn1(m.conv1(x)))))


def plus(m, x):
    y = body(m, x)
    y += x
    return m.relu(y)


def in_place(m, x):
    y = m.bn2(m.conv2(F.relu_(m.bn1(m.conv1(x)))))
    return y.add_(x).relu_()


def projected(m, x):
    return F.relu(m.bn3(m.conv3(x)) + body(m, x))


def idle(m, x):
    y = m.drop(m.relu(m.identity(m.bn1(m.identity(m.conv1(x))))))
    y = F.dropout(m.bn2(m.conv2(y)), 0.0, m.training)
    return m.identity(F.relu(F.dropout(y, 0.3, training=False) + m.identity(x)))


class Helper(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([conv(), nn.BatchNorm2d(8)])
        self.activate = True

    def forward(self, x, factor=None):
        for layer in self.layers:
            x = layer(x)
        if isinstance(factor, float):
            x = x * factor
        return F.relu(x, inplace=True) if self.activate else x


def bottleneck(m, x):
    return m.relu(m.bn2(m.conv2(m.helper(m.relu(m.bn1(m.conv1(x)))))) + x)


# Dataflows that are one chain, whole: with how many convolutions.
WHOLE = {
    "conv, bn": (lambda m, x: m.bn1(m.conv1(x)), 1, {}),
    "conv, bn, relu": (lambda m, x: m.relu(m.bn1(m.conv1(x))), 1, {}),
    "functions": (lambda m, x: torch.relu(m.bn1(m.conv1(x))).clone() if False else m.bn1(m.conv1(x)).relu(), 1, {}),
    "chain": (body, 2, {}),
    "residual": (plus, 2, {}),
    "in place": (in_place, 2, {"relu": nn.ReLU(inplace=True)}),
    "x first": (lambda m, x: torch.relu(x + body(m, x)), 2, {}),
    "torch.add": (lambda m, x: torch.relu_(torch.add(body(m, x), x)), 2, {}),
    "method": (lambda m, x: body(m, x).add(x).relu(), 2, {}),
    "projection": (projected, 3, {"conv3": conv(kernel=1), "bn3": nn.BatchNorm2d(8)}),
    "idle parts": (idle, 2, {"drop": nn.Dropout2d(0.0), "identity": nn.Identity()}),
    "helper": (bottleneck, 3, {"helper": Helper()}),
    "two residuals": (lambda m, x: m.relu(m.bn2(m.conv2(y := m.relu(m.bn1(m.conv1(x)) + x))) + y), 2, {}),
}


@pytest.mark.parametrize("name", WHOLE)
def test_the_pattern(name):
    dataflow, layers, parts = WHOLE[name]
    net = prepared(Net(dataflow, **copy.deepcopy(parts)))
    unused = [n for n in ("conv1", "conv2") if layers == 1 and n == "conv2"]
    fused = resnet_fast.fuse(net)
    assert type(fused).__name__ == "FusedNet"
    rows = [row for row in resnet_fast.report(fused).rows if row.status == "fused"]
    assert [(row.name, row.layers) for row in rows] == [("", layers)]
    for n in unused:
        assert rows[0].layers + len(unused) == sum(isinstance(m, nn.Conv2d) for m in net.modules()), n
    check_left_alone(net, fused)
    x = torch.randn(3, 8, 7, 6)
    check_inference(net, fused, x, factor=3)
    check_training(net, fused, x) if not unused else None
    assert backends.fallbacks() == {}


class Pool(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.conv, self.bn = conv(8, 16, 1), nn.BatchNorm2d(16)
        self.scale = nn.Parameter(torch.rand(1))
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        """A stem, a layer, and around them a parameter, a size, keyword arguments, several results."""
        y = self.stem(x)
        y = F.relu(self.bn(self.conv(y)), inplace=True) * self.scale
        pooled = F.avg_pool2d(y, kernel_size=(y.size(2), y.size(3)))
        return {"scores": self.fc(pooled.view(x.size(0), -1)), "maps": [y, y[:, ::2]]}


class DenseLayer(nn.Module):
    """Pre-activation; asks whether it was given one map or several."""

    def __init__(self, channels):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, 8, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), conv(8, 4)

    def forward(self, x):
        x = [x] if isinstance(x, torch.Tensor) else x
        y = self.conv1(F.relu(self.bn1(torch.cat(x, 1))))
        return self.conv2(F.relu(self.bn2(y)))


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([DenseLayer(8 + 4 * i) for i in range(3)])

    def forward(self, x):
        maps = [x]
        for layer in self.layers:
            maps.append(layer(maps))
        return torch.cat(maps, 1)


def values(result):
    return list(result.values())[:1] + result["maps"] if isinstance(result, dict) else [result]


@pytest.mark.parametrize(
    ("make", "fused_layers", "channels"), [(Pool, 2, 3), (Dense, 6, 8), (lambda: DenseLayer(8), 2, 8)]
)
def test_runs_inside_a_larger_forward(make, fused_layers, channels):
    net = prepared(make())
    fused = resnet_fast.fuse(net)
    report = resnet_fast.report(fused)
    assert report.fused == fused_layers, str(report)
    check_left_alone(net, fused)
    x = torch.randn(2, channels, 8, 8)
    exact = values(copy.deepcopy(net).double()(x.double()))
    with backends.use("cpu"):
        results = values(fused(x))
        for ours, theirs, e in zip(results, values(net(x)), exact, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
            assert (ours - e).norm() <= 3 * (theirs - e).norm() + 1e-7 * e.norm()
            assert ours.stride() == theirs.stride()
        sum(y.square().mean() for y in values(fused.train()(x))).backward()
    sum(y.square().mean() for y in values(net.train()(x))).backward()
    for (name, p), q in zip(fused.named_parameters(), net.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-6), name
    for (name, p), q in zip(fused.named_buffers(), net.buffers(), strict=True):
        assert torch.allclose(p.double(), q.double(), rtol=1e-5), name
    assert backends.fallbacks() == {}


def test_a_sequential_of_blocks_is_a_stage_and_stages_stay_apart():
    stages = [nn.Sequential(*(reference.BasicBlock(8, 8) for _ in range(2))) for _ in range(2)]
    fused = resnet_fast.fuse(nn.Sequential(*stages).eval())
    assert [(r.name, r.layers) for r in resnet_fast.report(fused).rows] == [("0", 4), ("1", 4)]
    assert isinstance(fused[0][1], ConvertedModule)


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
    "SyncBatchNorm": (lambda m, x: m.bn1(m.conv1(x)), {"bn1": nn.SyncBatchNorm(8)}, r"SyncBatchNorm \(bn1\) behind it"),
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


@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.LeakyReLU(0.1), nn.SiLU(), nn.PReLU()], ids=repr)
def test_another_activation_stays_outside(activation):
    net = prepared(Net(plus, relu=activation))
    fused = resnet_fast.fuse(net)
    (whole, *_) = resnet_fast.report(fused).rows
    assert whole.status == "fused"
    assert whole.layers == 2
    x = torch.randn(2, 8, 6, 6)
    with backends.use("cpu"):
        assert torch.allclose(fused(x), net(x), rtol=1e-4, atol=1e-5)
    rows = resnet_fast.report(fused).rows
    assert any(f"{type(activation).__name__} (relu) is not part of the pattern" in r.detail for r in rows), rows


class Closed(Net):
    def __init_subclass__(cls, **kwargs):
        raise TypeError("no subclasses")


def test_a_class_that_cannot_be_extended():
    net = prepared(Closed(body))
    rows = {row.name: row.detail for row in resnet_fast.report(resnet_fast.fuse(net, inplace=True)).rows}
    assert type(net) is Closed
    assert rows[""] == "a class that cannot be extended: no subclasses"


def test_a_sum_without_relu():
    """In training mode the layers are fused and the sum is not: what is called fused must run fused."""
    net = prepared(Net(lambda m, x: body(m, x) + x))
    fused = resnet_fast.fuse(net)
    x = torch.randn(3, 8, 7, 6)
    check_inference(net, fused, x, factor=3)
    with backends.use("cpu"):
        check_training(net, fused, x)
    assert backends.fallbacks() == {}


def test_values_are_let_go_once_nobody_reads_them():
    """As in the original code, and not at the end of the forward."""
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
    assert names == {"__prepare_scriptable__", "_fused_or_original", "_resnet_fast", "fused_from"}
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
    """What is read elsewhere, by the code or by the caller, must be there."""
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
    """The dropout is a function, which goes by the flag of the module around it."""
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


def test_a_convolution_that_two_modules_share():
    shared = conv()
    net = prepared(nn.Sequential(*(nn.Sequential(shared, nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2))))
    fused = resnet_fast.fuse(net)
    rows = {row.name: row.detail for row in resnet_fast.report(fused).rows}
    assert rows["0.0"] == "shared with another module"
    assert resnet_fast.report(fused).fused == 0

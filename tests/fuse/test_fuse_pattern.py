"""``fuse`` on small modules: what is the pattern, alone and inside a larger forward."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.fuse_checks import check_inference, check_left_alone, check_training, prepared
from helpers.fuse_support import Net, body, conv
from torch import nn

import resnet_fast
from resnet_fast import backends, reference
from resnet_fast.fusion.converted_module import ConvertedModule


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
    """Pre-activation; takes one feature map or a list of them."""

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


def test_a_sum_without_relu():
    """In training mode the layers are fused and the sum is not. What the report calls fused must run fused."""
    net = prepared(Net(lambda m, x: body(m, x) + x))
    fused = resnet_fast.fuse(net)
    x = torch.randn(3, 8, 7, 6)
    check_inference(net, fused, x, factor=3)
    with backends.use("cpu"):
        check_training(net, fused, x)
    assert backends.fallbacks() == {}

"""``fuse`` on code as networks in the wild have it: frozen batch norms, layers that do nothing, pools as functions, and
modules that fuse in one mode alone."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from helpers.fuse_checks import check_inference, check_training, prepared
from torch import nn

import resnet_fast
from resnet_fast import backends, reference
from resnet_fast.fusion.converted_module import ConvertedModule


class Frozen(nn.Module):
    """A batch norm that keeps its statistics, in any mode: four buffers."""

    def __init__(self, n, eps=1e-3):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.rand(n) + 0.5)
        self.register_buffer("bias", torch.randn(n) * 0.2)
        self.register_buffer("running_mean", torch.randn(n) * 0.2)
        self.register_buffer("running_var", torch.rand(n) + 0.5)

    def forward(self, x):
        w, b, mean, var = (
            t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = w * (var + self.eps).rsqrt()
        return x * scale + (b - mean * scale)


class FrozenInOtherWords(Frozen):
    def forward(self, x):
        w, b = self.weight.view((1, -1, 1, 1)), self.bias.view((1, -1, 1, 1))
        mean, var = self.running_mean.view((1, -1, 1, 1)), self.running_var.view((1, -1, 1, 1))
        scale = torch.mul(torch.rsqrt(torch.add(var, 1e-5)), w)
        return torch.add(torch.sub(b, scale * mean), torch.mul(scale, x))


class WithoutShift(Frozen):
    """No batch norm: nothing subtracts the mean."""

    def forward(self, x):
        w, b, var = (t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_var))
        return x * (w * (var + self.eps).rsqrt()) + b


class AnotherShift(Frozen):
    """The weight where the bias would be."""

    def forward(self, x):
        w, var, mean = (t.reshape(1, -1, 1, 1) for t in (self.weight, self.running_var, self.running_mean))
        scale = w * (var + self.eps).rsqrt()
        return x * scale + (w - mean * scale)


class SharesItsScale(Frozen):
    """Other code reads a value that the chain would not compute."""

    def forward(self, x):
        w, b, mean, var = (
            t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = w * (var + self.eps).rsqrt()
        return (x * scale + (b - mean * scale)) * scale.sigmoid()


def with_norms(kind):
    net = reference.CifarResNet(1)
    for m in list(net.modules()):
        for name, child in list(m.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(m, name, kind(child.num_features))
    net.avgpool, net.fc = nn.Identity(), nn.Identity()
    return net


@pytest.mark.parametrize("kind", [Frozen, FrozenInOtherWords])
def test_frozen_batch_norms(kind):
    net = with_norms(kind).eval()
    fused = resnet_fast.fuse(net)
    assert resnet_fast.report(fused).fused == 9
    x = torch.randn(2, 3, 16, 16)
    check_inference(net, fused, x)
    check_training(net, fused, x)
    assert backends.fallbacks() == {}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_frozen_batch_norms_that_change(training):
    net = with_norms(Frozen).train(training)
    fused = resnet_fast.fuse(net)
    x = torch.randn(2, 3, 12, 12)
    before = fused(x)
    for action in (
        lambda m: m.bn1.weight.mul_(2),
        lambda m: m.layer1[0].bn2.running_mean.add_(1),
        lambda m: setattr(m.layer2[0].bn1, "running_var", m.layer2[0].bn1.running_var * 3),
        lambda m: setattr(m.layer3[0].bn1, "eps", 2.0),
    ):
        action(net), action(fused)
        y, expected = fused(x), net(x)
        assert not torch.allclose(y, before, rtol=1e-3)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        before = y


def with_one_channel():
    """Which is broadcast."""
    net = with_norms(Frozen).eval()
    net.bn1 = Frozen(1)
    return net, torch.randn(2, 3, 12, 12), False


def with_another_dtype():
    net = with_norms(Frozen).eval().bfloat16()
    net.bn1.float()
    net.layer1.float(), net.layer2.float(), net.layer3.float()
    return net, torch.randn(2, 3, 12, 12).bfloat16(), False


def under_autocast():
    return with_norms(Frozen).eval(), torch.randn(2, 3, 12, 12), True


@pytest.mark.parametrize("case", [with_one_channel, with_another_dtype, under_autocast])
@torch.no_grad()
def test_frozen_batch_norms_run_unfused_where_they_compute_otherwise(case):
    net, x, autocast = case()
    fused = resnet_fast.fuse(net)
    backends.fallbacks(clear=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, expected = fused(x), net(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert any("frozen batch norm" in reason for reason in backends.fallbacks(clear=True))


@pytest.mark.parametrize("kind", [WithoutShift, AnotherShift, SharesItsScale])
def test_what_is_no_frozen_batch_norm(kind):
    net = with_norms(kind).eval()
    fused = resnet_fast.fuse(net)
    assert resnet_fast.report(fused).fused == 0
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(fused(x), net(x))


class Run(nn.Module):
    """Two layers with ``between`` in between, and ``behind`` behind them, which is no layer."""

    def __init__(self, *between, behind=torch.sigmoid):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.between = nn.Sequential(*between)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.behind = behind

    def forward(self, x):
        y = self.between(F.relu(self.bn1(self.conv1(x))))
        return self.behind(F.relu(self.bn2(self.conv2(y))))


def same(net, x):
    """In both modes."""
    fused = resnet_fast.fuse(net)
    for training in (False, True):
        net.train(training), fused.train(training)
        torch.manual_seed(0)
        expected = net(x)
        torch.manual_seed(0)
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
    return fused


@pytest.mark.parametrize(
    "between",
    [
        (nn.Identity(), nn.Identity()),
        (nn.Dropout(0.5), nn.Identity()),
        (nn.Identity(), nn.Dropout(0.0), nn.Dropout2d(0.3), nn.Identity()),
    ],
    ids=["two identities", "dropout, identity", "four"],
)
def test_layers_that_do_nothing_in_a_row(between):
    fused = same(prepared(Run(*between)), torch.randn(2, 8, 9, 9))
    assert resnet_fast.report(fused).fused == 2


class InOneMode(Run):
    wanted = False

    def forward(self, x):
        if self.training is not self.wanted:
            return torch.sigmoid(self.conv1(x))
        return super().forward(x)


class InTraining(InOneMode):
    wanted = True


@pytest.mark.parametrize("kind", [InOneMode, InTraining])
def test_modules_that_fuse_in_one_mode(kind):
    net = prepared(kind())
    fused = same(net, torch.randn(2, 8, 9, 9))
    assert isinstance(fused, ConvertedModule)
    mode = "eval" if kind.wanted else "training"
    (row,) = [row for row in resnet_fast.report(fused).rows if row.status == "fused"]
    assert row.detail.endswith(f"not in {mode} mode: nothing to fuse in this mode")


def test_a_module_that_fuses_in_no_mode():
    assert not isinstance(resnet_fast.fuse(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Sigmoid())), ConvertedModule)


class Pools(Run):
    def forward(self, x):
        y = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        return F.adaptive_max_pool2d(F.relu(self.bn2(self.conv2(y))), (1, 1))


@torch.no_grad()
def test_pools_as_functions_are_pickled():
    net = prepared(Pools())
    fused = resnet_fast.fuse(net)
    assert resnet_fast.report(fused).fused == 2
    stream = io.BytesIO()
    torch.save(fused, stream)
    stream.seek(0)
    x = torch.randn(2, 8, 12, 12)
    for again in (torch.load(stream, weights_only=False), copy.deepcopy(fused)):
        with backends.use("cpu"):
            assert torch.equal(again(x), fused(x))
    torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-5)

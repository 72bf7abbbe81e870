"""Batch norm that a class computes by ``F.batch_norm`` in its own ``forward``: fused by what the code computes."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.fuse_checks import check_inference, check_left_alone, check_training, prepared
from torch import nn

import resnet_fast
from resnet_fast import backends
from resnet_fast.chain.layout import is_channels_last


class NormAct(nn.BatchNorm2d):
    """As in networks that move the activation into the norm and keep the names of their weights."""

    def __init__(self, channels, act=None, **kwargs):
        super().__init__(channels, **kwargs)
        self.drop = nn.Identity()
        self.act = nn.Identity() if act is None else act

    def statistics(self):
        return self.training or self.running_mean is None

    def count(self):
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)

    def forward(self, x):
        torch._assert(x.ndim == 4, f"{x.ndim} dimensions")
        self.count()
        kept = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if kept else (None, None)
        momentum = 0.0 if self.momentum is None else self.momentum
        x = F.batch_norm(x, mean, var, self.weight, self.bias, self.statistics(), momentum, self.eps)
        return self.act(self.drop(x))


class Block(nn.Module):
    def __init__(self, norm=NormAct, **kwargs):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8, nn.ReLU(), **kwargs)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), norm(8, **kwargs)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + x)


def randomized(**kwargs):
    return prepared(Block(**kwargs)) if kwargs.get("affine", True) else Block(**kwargs).eval()


@pytest.mark.parametrize(
    "settings", [{}, {"eps": 0.1, "momentum": 0.3}, {"affine": False}], ids=["plain", "settings", "not affine"]
)
def test_a_block_is_fused_whole(settings):
    net = randomized(**settings)
    fused = resnet_fast.fuse(net)
    assert [(row.name, row.layers, row.detail) for row in resnet_fast.report(fused).rows] == [("", 2, "2 convolutions")]
    check_left_alone(net, fused)
    x = torch.randn(3, 8, 9, 7)
    check_inference(net, fused, x)
    check_training(net, fused, x)
    for m in (net.train(), fused.train()):
        m.bn2.eval()
    with backends.use("cpu"):
        torch.testing.assert_close(fused(x), net(x))
    for name, t in net.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], t)


def test_an_assertion_is_not_lost():
    fused = resnet_fast.fuse(randomized())
    with pytest.raises(AssertionError, match="3 dimensions"):
        fused(torch.randn(8, 9, 7))
    assert backends.fallbacks() == {"FusedBlock: an input of 3 dimensions": 1}


class OtherEps(NormAct):
    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, 2 * self.eps)
        return self.act(x)


class OtherOrder(NormAct):
    def forward(self, x):
        return self.act(F.batch_norm(x, self.running_var, self.running_mean.exp(), self.weight, self.bias))


class Swapped(NormAct):
    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.bias, self.weight, False, 0.1, self.eps)
        return self.act(x)


class Unscaled(NormAct):
    def forward(self, x):
        return self.act(F.batch_norm(x, self.running_mean, self.running_var, eps=self.eps))


class Borrowed(NormAct):
    """The weight of another norm."""

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.act.weight, self.bias, self.training)
        return x.relu()


class OfTheBatch(NormAct):
    def statistics(self):
        return True


class Uncounted(NormAct):
    def count(self):
        pass


class OtherMomentum(NormAct):
    def forward(self, x):
        self.count()
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.5, self.eps)
        return self.act(x)


class CountedTwice(NormAct):
    def count(self):
        if self.training:
            self.num_batches_tracked.add_(2)


@pytest.mark.parametrize("norm", [OtherEps, OtherOrder, Swapped, Unscaled, Borrowed])
def test_what_computes_something_else_is_left_alone(norm):
    net = prepared(Block(norm))
    if norm is Borrowed:
        net.bn1.act, net.bn2.act = nn.BatchNorm2d(8).eval(), nn.BatchNorm2d(8).eval()
    fused = resnet_fast.fuse(net)
    rows = [row for row in resnet_fast.report(fused).rows if row.module == "Conv2d"]
    assert [row.detail for row in rows] == ["batch_norm behind it, where a BatchNorm2d would be"] * 2
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(fused(x), net(x))


@pytest.mark.parametrize(
    ("norm", "mode"),
    [(Uncounted, "training"), (CountedTwice, "training"), (OtherMomentum, "training"), (OfTheBatch, "eval")],
)
def test_what_is_a_batch_norm_in_one_mode_alone(norm, mode):
    net = prepared(Block(norm))
    fused = resnet_fast.fuse(net)
    (row,) = resnet_fast.report(fused).rows
    assert row.detail == f"2 convolutions, not in {mode} mode: nothing to fuse in this mode"
    x = torch.randn(2, 8, 6, 6)
    for training in (False, True):
        for m in (net, fused):
            m.train(training)
        torch.testing.assert_close(fused(x), net(x), rtol=1e-5, atol=1e-5)
        assert bool(backends.fallbacks(clear=True)) == (mode == ("training" if training else "eval"))
    for name, t in net.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], t)


CHANGES = {
    "eps": (lambda m: setattr(m.bn1, "eps", 0.5), "another value of NormAct.eps"),
    "activation": (lambda m: setattr(m.bn1, "act", nn.Tanh()), "Tanh"),
    "activation in the place of none": (
        lambda m: setattr(m.bn2, "act", nn.Hardtanh(-0.1, 0.1)),
        "Hardtanh where a Identity was",
    ),
    "drop": (lambda m: setattr(m.bn1, "drop", nn.Dropout(0.5)), "a Dropout where a Identity was"),
    "hook": (lambda m: m.bn1.register_forward_hook(lambda *a: a[2] * 2), "a hook on a NormAct"),
    "class": (lambda m: setattr(m.bn1, "__class__", OtherEps), "a OtherEps where a NormAct was"),
    "mode": (lambda m: m.bn1.train(), "batch norm in training mode"),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_changes_afterwards(name):
    net = randomized()
    fused = resnet_fast.fuse(net)
    x = torch.randn(2, 8, 6, 6)
    before = fused(x)
    change, reason = CHANGES[name]
    change(net)
    change(fused)
    results = []
    for m in (fused, net):
        torch.manual_seed(0)  # for dropout
        results.append(m(x))
    after, expected = results
    assert torch.equal(after, expected)
    assert not torch.allclose(after, before)
    assert any(reason in key for key in backends.fallbacks()), backends.fallbacks()


class Buffers(nn.Module):
    """One trace cannot stand for code that changes a buffer or reads its value."""

    def __init__(self, ask):
        super().__init__()
        self.conv, self.bn, self.ask = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), ask
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("flag", torch.tensor(True))

    def forward(self, x):
        self.calls.add_(1)
        y = self.bn(self.conv(x))
        return y.relu() if not self.ask or self.flag else y


@pytest.mark.parametrize("ask", [False, True])
@torch.no_grad()
def test_buffers_that_the_code_uses(ask):
    net = Buffers(ask).eval()
    fused = resnet_fast.fuse(net)
    resnet_fast.report(net)
    assert net.calls == 0
    x = torch.randn(2, 4, 6, 6)
    for flag in (True, False):
        net.flag.fill_(flag)
        fused.flag.fill_(flag)
        torch.testing.assert_close(fused(x), net(x))
    assert fused.calls == net.calls == 2
    assert resnet_fast.report(fused).fused == (not ask)


def test_memory_formats_of_sizes_that_are_one():
    """The format of a convolution's result where the strides fit both formats."""
    for shape in itertools.product((1, 2), (1, 5), (1, 2, 4), (1, 4)):
        wide = torch.randn([2 * s for s in shape])
        for whole in (wide, wide.to(memory_format=torch.channels_last)):
            x = whole[tuple(slice(s) for s in shape)]
            for weight in (torch.randn(3, shape[1], 1, 1), torch.randn(3, shape[1], 1, 1)[:, :, :1, :1]):
                for w in (weight, weight.to(memory_format=torch.channels_last)):
                    y = F.conv2d(x, w)
                    formats = [y.is_contiguous(), y.is_contiguous(memory_format=torch.channels_last)]
                    if formats != [True, True]:
                        assert formats[1] == (is_channels_last(x) or is_channels_last(w)), (x.stride(), w.stride())

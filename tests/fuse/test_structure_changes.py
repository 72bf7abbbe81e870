"""Modules that are added, removed, shared or moved after a network was fused: results are those of plain PyTorch."""

import copy

import pytest
import torch
from helpers.fuse_checks import prepared
from helpers.support import assert_error_rule, eager_results, twins
from torch import nn

import resnet_fast
from resnet_fast import backends, blocks, reference

X = (2, 3, 16, 16)


class Body(nn.Module):
    """Blocks in a list that ``forward`` walks through, between a stem and a head."""

    def __init__(self, rows=nn.Sequential):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        layers = [reference.BasicBlock(8, 8, 1) for _ in range(3)]
        self.body = rows(layers) if rows is nn.ModuleList else rows(*layers)
        self.extra = nn.ModuleList()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.body:
            x = block(x)
        for layer in self.extra:
            x = layer(x)
        return self.head(x.mean((2, 3)))


class Walk(nn.Module):
    """A block whose layers are in lists: one forward runs them all."""

    def __init__(self, rows=nn.ModuleList):
        super().__init__()
        convs = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)]
        norms = [nn.BatchNorm2d(8) for _ in range(2)]
        self.convs, self.norms = (rows(m) if rows is nn.ModuleList else rows(*m) for m in (convs, norms))
        self.after = nn.ModuleList()
        self.named = nn.ModuleDict()

    def forward(self, x):
        y = x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            y = torch.relu(norm(conv(y)))
        for layer in self.after:
            y = layer(y)
        if "last" in self.named:
            y = self.named["last"](y)
        return torch.relu(y + x)


class Chosen(nn.ModuleDict):
    def forward(self, x):
        return self["b"](self["a"](x))


def fused_pair(net, shape=X):
    torch.manual_seed(0)
    net = prepared(net)
    fused = resnet_fast.fuse(net)
    with torch.no_grad(), backends.use("cpu"):
        fused(torch.randn(shape))
    return fused, net


def native_pair(name="cifar_resnet20"):
    fused, net = twins(getattr(resnet_fast, name), getattr(reference, name))
    with torch.no_grad(), backends.use("cpu"):
        fused(torch.randn(X))
    return fused, net


def seeded(make):
    """The same new module for both networks."""
    torch.manual_seed(9)
    return prepared(make())


def assert_same(ours, plain, x):
    """In eval mode; the gradients and statistics of a step in float64; and in eval mode after that."""
    exact, eager = eager_results(plain, x)
    with torch.no_grad():
        assert_error_rule(ours(x), exact, eager, factor=3)
    ours, plain = copy.deepcopy(ours).double(), copy.deepcopy(plain).double()
    for _ in range(2):
        for m in (ours.train(), plain.train()):
            m.zero_grad()
            y = m(x.double())
            if y.requires_grad:  # there are layers left
                y.square().sum().backward()
        theirs = dict(plain.named_parameters())
        for name, p in ours.named_parameters():
            grad = theirs[name].grad
            assert (p.grad is None) == (grad is None), name
            if grad is not None:
                torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-9 * float(grad.norm() + 1), msg=name)
        torch.testing.assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x.double()), plain.eval()(x.double()), rtol=1e-9, atol=1e-9)


def block():
    return reference.BasicBlock(8, 8, 1)


def swap(row, i, j):
    row[i], row[j] = row[j], row[i]


CHANGES = {
    "appended": lambda m: m.body.append(seeded(block)),
    "appended again": lambda m: m.body.append(m.body[0]),
    "inserted": lambda m: m.body.insert(1, seeded(block)),
    "extended": lambda m: m.body.extend([seeded(block)]),
    "another layer appended": lambda m: m.body.append(nn.Tanh()),
    "deleted": lambda m: m.body.__delitem__(1),
    "deleted at the end": lambda m: m.body.__delitem__(-1),
    "all deleted": lambda m: m.body.__delitem__(slice(None)),
    "swapped": lambda m: swap(m.body, 0, 2),
    "twice": lambda m: m.body.__setitem__(2, m.body[1]),
    "replaced": lambda m: m.body.__setitem__(1, seeded(block)),
    "replaced by another kind": lambda m: m.body.__setitem__(1, nn.Identity()),
    "sliced": lambda m: setattr(m, "body", m.body[:2]),
    "sliced backwards": lambda m: setattr(m, "body", m.body[1:]),
    "concatenated": lambda m: setattr(m, "body", m.body + m.body),
    "into an empty list": lambda m: m.extra.append(seeded(block)),
    "the same into an empty list": lambda m: m.extra.append(m.body[0]),
    "another layer into an empty list": lambda m: m.extra.append(nn.Tanh()),
    "constructed again": lambda m: m.body.__setitem__(0, made_again(m.body[0])),
    "a stem with more in it": lambda m: m.stem.append(nn.Tanh()),
    "a stem with less in it": lambda m: m.stem.__delitem__(2),
    "a norm twice in the stem": lambda m: m.stem.insert(2, m.stem[1]),
    "the stem's norm in a block": lambda m: setattr(m.body[0], "bn2", m.stem[1]),
    "a convolution of the next block": lambda m: setattr(m.body[0], "conv2", m.body[1].conv1),
}


def made_again(module):
    """By its class; where it is fused, that is the one that fuse made."""
    torch.manual_seed(5)
    again = type(module)(8, 8, 1)
    again.load_state_dict(module.state_dict())
    return again.eval()


@pytest.mark.parametrize("rows", [nn.Sequential, nn.ModuleList])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_a_fused_network(name, rows):
    fused, net = fused_pair(Body(rows))
    for m in (fused, net):
        CHANGES[name](m)
    assert_same(fused, net, torch.randn(X))


IN_A_BLOCK = {
    "appended": lambda m: (
        m.convs.append(seeded(lambda: nn.Conv2d(8, 8, 1))),
        m.norms.append(nn.BatchNorm2d(8).eval()),
    ),
    "the same appended": lambda m: (m.convs.append(m.convs[0]), m.norms.append(m.norms[0])),
    "deleted": lambda m: (m.convs.__delitem__(0), m.norms.__delitem__(0)),
    "all deleted": lambda m: (m.convs.__delitem__(slice(None)), m.norms.__delitem__(slice(None))),
    "swapped": lambda m: swap(m.convs, 0, 1),
    "norms swapped": lambda m: swap(m.norms, 0, 1),
    "into an empty list": lambda m: m.after.append(nn.Tanh()),
    "the same into an empty list": lambda m: m.after.append(m.convs[0]),
    "into an empty dict": lambda m: m.named.update({"last": nn.Tanh()}),
    "other lists": lambda m: setattr(m, "convs", m.convs[::-1]),
    "a list replaced": lambda m: setattr(m, "after", nn.ModuleList([nn.Tanh()])),
    "a norm of the list twice": lambda m: m.norms.__setitem__(1, m.norms[0]),
}


@pytest.mark.parametrize("around", [lambda m: m, nn.Sequential], ids=["alone", "in a Sequential"])
@pytest.mark.parametrize("rows", [nn.Sequential, nn.ModuleList])
@pytest.mark.parametrize("name", IN_A_BLOCK)
def test_changes_of_lists_in_a_fused_block(name, rows, around):
    shape = (2, 8, 6, 6)
    fused, net = fused_pair(around(Walk(rows)), shape)
    for m in (fused, net):
        IN_A_BLOCK[name](next(part for part in m.modules() if isinstance(part, Walk)))
    assert_same(fused, net, torch.randn(shape))


def test_lists_that_stay_leave_it_fused():
    fused, net = fused_pair(Walk(), (2, 8, 6, 6))
    for m in (fused, net):
        m.convs[0] = seeded(lambda: nn.Conv2d(8, 8, 5, padding=2))
        m.norms[1] = seeded(lambda: nn.BatchNorm2d(8))
    with backends.use("cpu"):
        assert_same(fused, net, torch.randn(2, 8, 6, 6))


NATIVE = {
    "a block appended": lambda m: m.layer1.append(seeded(lambda: reference.BasicBlock(16, 16, 1))),
    "a block of ours appended": lambda m: m.layer1.append(seeded(lambda: blocks.BasicBlock(16, 16, 1))),
    "a block twice": lambda m: m.layer1.__setitem__(2, m.layer1[1]),
    "a block deleted": lambda m: m.layer1.__delitem__(1),
    "a stage sliced": lambda m: setattr(m, "layer1", m.layer1[:2]),
    "stages concatenated": lambda m: setattr(m, "layer1", m.layer1 + m.layer1),
    "blocks swapped": lambda m: swap(m.layer1, 0, 2),
    "another layer in a stage": lambda m: m.layer1.insert(1, nn.Tanh()),
    "a norm in the projection": lambda m: m.layer2[0].downsample.append(seeded(lambda: nn.BatchNorm2d(32))),
    "the same norm in the projection": lambda m: m.layer2[0].downsample.append(m.layer2[0].downsample[1]),
    "a ReLU of the block in the projection": lambda m: m.layer2[0].downsample.append(m.layer2[0].relu),
    "a projection without norm": lambda m: m.layer2[0].downsample.__delitem__(1),
    "an empty projection": lambda m: setattr(m.layer1[0], "downsample", nn.Sequential()),
    "a norm twice in a block": lambda m: setattr(m.layer1[0], "bn2", m.layer1[0].bn1),
    "a norm of another block": lambda m: setattr(m.layer1[0], "bn2", m.layer1[1].bn1),
    "a convolution of another block": lambda m: setattr(m.layer1[0], "conv2", m.layer1[1].conv1),
    "no classifier": lambda m: setattr(m, "fc", nn.Identity()),
    "another head": lambda m: setattr(m, "fc", seeded(lambda: nn.Linear(64, 3))),
    "no stage": lambda m: setattr(m, "layer1", nn.Identity()),
    "a block constructed again": lambda m: m.layer1.__setitem__(0, again(m.layer1[0])),
}


def again(module):
    torch.manual_seed(5)
    made = type(module)(16, 16, 1)
    made.load_state_dict(module.state_dict())
    return made.eval()


@pytest.mark.parametrize("name", NATIVE)
def test_changes_of_our_networks(name):
    ours, plain = native_pair()
    for m in (ours, plain):
        NATIVE[name](m)
    assert_same(ours, plain, torch.randn(X))


@pytest.mark.parametrize("pair", [native_pair, lambda: fused_pair(reference.cifar_resnet20())], ids=["ours", "fused"])
@pytest.mark.parametrize(
    "take",
    [
        lambda m: nn.Sequential(m.conv1, m.bn1, m.relu, m.layer1, m.layer2),
        lambda m: nn.Sequential(*list(m.children())[:-2]),
        lambda m: nn.Sequential(m.conv1, m.layer1[1], m.layer1[:2], m.layer1[1]),
        lambda m: nn.Sequential(m.conv1, *m.layer1, *m.layer1),
        lambda m: Chosen({"a": m.conv1, "b": m.layer1}),
    ],
    ids=["by name", "children", "slices and twice", "all twice", "dict"],
)
def test_parts_in_other_networks(pair, take):
    ours, plain = (take(m) for m in pair())
    assert_same(ours, plain, torch.randn(X))


@pytest.mark.parametrize("pair", [native_pair, lambda: fused_pair(reference.cifar_resnet20())], ids=["ours", "fused"])
@pytest.mark.parametrize("names", [["fc"], ["avgpool", "fc"], ["layer3"], ["bn1"], ["relu"]], ids=" ".join)
@pytest.mark.parametrize("way", ["del", "None"])
def test_layers_taken_away(pair, names, way):
    """What still works in plain PyTorch works; what does not raises the same error."""
    ours, plain = pair()
    for m in (ours, plain):
        for name in names:
            delattr(m, name) if way == "del" else setattr(m, name, None)
    x = torch.randn(X)
    for method in ("features", "__call__"):
        outcomes = []
        for m in (plain, ours):
            try:
                with torch.no_grad():
                    outcomes.append(getattr(m, method)(x))
            except (AttributeError, TypeError) as error:
                outcomes.append(error)
        theirs, found = outcomes
        if isinstance(theirs, Exception):
            assert type(found) is type(theirs), found
            assert str(found).replace("Fused", "") == str(theirs)
        else:
            torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-4)

"""``forward`` methods as people write them: the network around them, and how to run it beside its fused copy."""

import copy
import random
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from helpers.fuse_checks import prepared
from torch import nn

import resnet_fast

SHAPE = (2, 8, 6, 6)
SCALE, CACHE = 1.0, {}
HIDDEN = {"generator", "random", "act", "function", "choose"}  # attributes that snapshots leave out


def helper(x):
    return x * SCALE


def tanh_helper(x):
    return x.tanh()


class Inner(nn.Module):
    factor = 2.0

    def forward(self, x):
        return x * self.factor


class Counted(nn.ModuleList):
    count = 0

    def __iter__(self):
        self.count += 1
        return super().__iter__()


class Base(nn.Module):
    """``relu(norm(conv(x)) + x)``, and what the networks below read and write."""

    kind = "plain"

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner = nn.Module()
        self.inner.scale = 2.0
        self.rows = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)])
        self.special, self.counted = Inner(), Counted([nn.Tanh()])
        self.rows[0].scale, self.rows[1].scale = 1.0, 2.0
        self.flags, self.config = {"skip": True}, SimpleNamespace(skip=True)
        self.nested, self.numbers, self.acts, self.history = {"a": [1]}, [1.0, 2.0], {}, []
        self.skip, self.times, self.scale, self.table = True, 1, 2.0, (1.0, 3.0)
        self.act, self.function = F.relu, helper
        self.generator, self.random = torch.Generator().manual_seed(0), random.Random(0)
        self.register_buffer("calls", torch.zeros(1))

    def pattern(self, x):
        return self.norm(self.conv(x))

    @property
    def skips(self):
        return self.skip

    @staticmethod
    def twice(x):
        return x * 2

    @classmethod
    def named(cls, x):
        return x * (2 if cls.kind == "plain" else 3)

    def choose(self):
        return self.skip

    def all_rows(self):
        return self.rows


class Cases(dict):
    """By name: the network's class, whether it runs fused, and a change to both networks between calls, or None."""

    def case(self, fused, change=None):
        def add(forward):
            kind = type(forward.__name__, (Base,), {"forward": forward, "__module__": forward.__module__})
            self[forward.__name__] = kind, fused, change
            return forward

        return add


def sets(name, value):
    return lambda m, patch: setattr(m, name, value)


def sets_global(space, name, value):
    return lambda m, patch: patch.setitem(space, name, value)


def twins(kind):
    torch.manual_seed(0)
    plain = prepared(kind())
    before = snapshot(plain)
    ours = copy.deepcopy(plain)
    resnet_fast.fuse(ours, inplace=True)
    assert same(before, snapshot(ours)), "fuse changed the network"
    return ours, plain


def snapshot(m):
    """All that a forward could change in the network."""
    return [
        (
            name,
            {k: repr(v) for k, v in vars(part).items() if k not in HIDDEN and not k.startswith("_")},
            list(part._modules),
            {k: (v.dtype, v.requires_grad, v.clone()) for k, v in part.state_dict().items()},
        )
        for name, part in m.named_modules()
    ]


def same(a, b):
    plain = [[part[:3] for part in parts] for parts in (a, b)]
    tensors = [[v for part in parts for v in part[3].values()] for parts in (a, b)]
    return plain[0] == plain[1] and all(
        s[:2] == t[:2] and torch.allclose(s[2], t[2], rtol=1e-4, atol=1e-5) for s, t in zip(*tensors, strict=True)
    )


def seed():
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    CACHE.clear()


def runs(m, x, calls):
    seed()
    return [m(x.clone()) for _ in range(calls)]

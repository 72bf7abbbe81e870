"""Random residual networks in plain PyTorch: blocks of all forms, and what people put between them."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

WIDTHS = (3, 4, 8, 8, 16, 16, 17, 24, 32)

# Ways to write a sum and a ReLU; those that write in place come last.
SUMS = (lambda y, x: y + x, lambda y, x: x + y, torch.add, lambda y, x: y.add(x), lambda y, x: y.add_(x))
RELUS = (F.relu, torch.relu, lambda y: y.relu(), nn.ReLU(), lambda y: F.relu(y, inplace=True), nn.ReLU(inplace=True))


class Activation(nn.Module):
    def __init__(self, rng):
        super().__init__()
        chosen = rng.choice(RELUS)
        if isinstance(chosen, nn.Module):
            self.module = nn.ReLU(chosen.inplace)
        self.function = None if isinstance(chosen, nn.Module) else RELUS.index(chosen)

    def forward(self, y):
        return self.module(y) if self.function is None else RELUS[self.function](y)


def activation(rng, kind="relu"):
    """A ReLU or, seldom, what no kernel knows."""
    if rng.random() < 0.1:
        return rng.choice((nn.LeakyReLU(0.1), nn.SiLU(), nn.ReLU6(), nn.Identity()))
    return Activation(rng) if rng.random() < 0.6 else nn.ReLU(inplace=rng.random() < 0.5)


def norm(rng, channels):
    """Batch norm of all kinds, none, or another."""
    chance = rng.random()
    if chance < 0.12:
        return nn.Identity()
    if chance < 0.18:
        # PyTorch crashes in the gradient of its affine form where channels come last and the input wants none.
        return nn.GroupNorm(1, channels, affine=False)
    return nn.BatchNorm2d(
        channels,
        eps=rng.choice((1e-5, 1e-5, 1e-3)),
        momentum=rng.choice((0.1, 0.1, 0.1, 0.3, None)),
        affine=rng.random() < 0.9,
        track_running_stats=rng.random() < 0.93,
    )


def conv(rng, channels, out, stride=1, kernel=None):
    """A convolution that keeps the size but for the stride; seldom with groups, dilation or other padding."""
    kernel = kernel or rng.choice(((3, 3), (3, 3), (3, 3), (1, 1), (1, 1), (5, 5), (1, 3), (3, 1), (7, 7)))
    dilation = 2 if rng.random() < 0.06 else 1
    groups = rng.choice([g for g in (1, 2, 4, channels) if channels % g == 0 == out % g]) if rng.random() < 0.1 else 1
    padding = tuple(dilation * (k // 2) for k in kernel)
    mode = "zeros" if rng.random() < 0.95 or max(padding) == 0 else rng.choice(("reflect", "circular", "replicate"))
    return nn.Conv2d(
        channels, out, kernel, stride, padding, dilation, groups, bias=rng.random() < 0.4, padding_mode=mode
    )


class Layer(nn.Module):
    """Convolution, norm and activation in one of their orders."""

    def __init__(self, rng, channels, out, stride=1, active=True):
        super().__init__()
        self.conv = conv(rng, channels, out, stride)
        self.first = rng.random() < 0.15  # pre-activation
        self.norm = norm(rng, channels if self.first else out)
        self.act = activation(rng) if active else None

    def forward(self, x):
        if self.first:
            x = self.norm(x)
            # Not in place: without a norm this is the block's input, which the shortcut wants.
            return self.conv(x if self.act is None else self.act(x + 0 if isinstance(self.norm, nn.Identity) else x))
        y = self.norm(self.conv(x))
        return y if self.act is None else self.act(y)


class Shortcut(nn.Module):
    """A projection, by a convolution, with or without a norm, or by pooling and channels of zeros."""

    def __init__(self, rng, channels, out, stride):
        super().__init__()
        self.stride, self.extra = stride, out - channels
        if out < channels or rng.random() < 0.8:
            self.conv = nn.Conv2d(channels, out, 1, stride, bias=rng.random() < 0.4)
            self.norm = norm(rng, out) if rng.random() < 0.8 else None
        else:
            self.conv = None

    def forward(self, x):
        if self.conv is not None:
            y = self.conv(x)
            return y if self.norm is None else self.norm(y)
        if self.stride > 1:
            x = F.avg_pool2d(x, 1, self.stride)
        return F.pad(x, (0, 0, 0, 0, 0, self.extra))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)) in all its spellings; seldom with a gate, a factor, dropout, or without the ReLU."""

    def __init__(self, rng, channels, out, stride):
        super().__init__()
        inner = rng.choice((out, out, out, 8, 12))
        count = rng.choice((1, 2, 2, 2, 3))
        widths = [channels, *[inner] * (count - 1), out]
        strided = rng.randrange(count)
        layers = [
            Layer(rng, a, b, stride if i == strided else 1, active=i < count - 1 or rng.random() < 0.1)
            for i, (a, b) in enumerate(pairwise(widths))
        ]
        self.body = nn.Sequential(*layers) if rng.random() < 0.7 else nn.ModuleList(layers)
        plain = stride == 1 and channels == out
        self.shortcut = None if plain and rng.random() < 0.8 else Shortcut(rng, channels, out, stride)
        self.gate = Gate(out) if rng.random() < 0.08 else None
        self.scale = nn.Parameter(torch.tensor(rng.uniform(0.5, 1.0))) if rng.random() < 0.08 else None
        self.drop = nn.Dropout(rng.choice((0.0, 0.1))) if rng.random() < 0.15 else None
        self.sum = rng.randrange(len(SUMS))
        self.skip = rng.random() < 0.92
        self.act = activation(rng) if rng.random() < 0.9 else None

    def forward(self, x):
        y = x
        for layer in self.body:
            y = layer(y)
        if self.gate is not None:
            y = self.gate(y)
        if self.scale is not None:
            y = y * self.scale
        if self.skip:
            y = SUMS[self.sum](y, x if self.shortcut is None else self.shortcut(x))
        if self.act is not None:
            y = self.act(y)
        return y if self.drop is None else self.drop(y)


class Branches(nn.Module):
    """Two ways side by side, joined by channels."""

    def __init__(self, rng, channels, out, stride):
        super().__init__()
        half = max(1, out // 2)
        self.left, self.right = Layer(rng, channels, half, stride), Residual(rng, channels, out - half, stride)

    def forward(self, x):
        return torch.cat([self.left(x), self.right(x)], 1)


def block(rng, channels, out, stride):
    return (Branches if out > 1 and rng.random() < 0.07 else Residual)(rng, channels, out, stride)


class Network(nn.Module):
    """Stem, stages, and seldom a head. ``reuse``: some blocks stand in it twice, or share their layers."""

    def __init__(self, rng, reuse=False):
        super().__init__()
        width = rng.choice(WIDTHS)
        self.stem = Layer(rng, 3, width, rng.choice((1, 1, 2)))
        self.pool = rng.choice((None, None, nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)))
        stages = []
        for _ in range(rng.randint(1, 2)):
            out = rng.choice(WIDTHS)
            blocks = [block(rng, width, out, rng.choice((1, 1, 2)))]
            blocks += [block(rng, out, out, 1) for _ in range(rng.randint(0, 2))]
            if reuse and rng.random() < 0.7:
                self.repeat(rng, blocks)
            stages.append(nn.Sequential(*blocks))
            width = out
        self.stages = nn.Sequential(*stages) if rng.random() < 0.5 else nn.ModuleList(stages)
        self.fc = nn.Linear(width, 7) if rng.random() < 0.15 else None

    @staticmethod
    def repeat(rng, blocks):
        """A block once more, or one that shares its layers, or a convolution in another's place."""
        last = blocks[-1]
        same = [b for b in blocks[1:] if isinstance(b, Residual) and isinstance(last, Residual)]
        if len(blocks) > 1 and rng.random() < 0.5:
            blocks.insert(rng.randint(1, len(blocks)), last)
        elif len(same) > 1 and len(same[0].body) == len(last.body):
            same[0].body = last.body
        elif len(blocks) > 1:
            blocks.append(last)

    def forward(self, x):
        y = self.stem(x)
        y = y if self.pool is None else self.pool(y)
        for stage in self.stages:
            y = stage(y)
        return y if self.fc is None else self.fc(y.mean((2, 3)))

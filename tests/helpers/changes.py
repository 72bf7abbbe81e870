"""What people do to a residual block between two calls; after which of it the block still runs fused, and why not."""

import torch
from helpers.support import twins
from torch import nn
from torch.nn.utils import parametrizations, prune

from resnet_fast import blocks, reference


def pair_of_blocks(**kwargs):
    return twins(blocks.Block, reference.Block, 16, 16, 1, **kwargs)


def fill(t, seed=7):
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)).to(t.dtype) * 0.3


def sgd_step(m):
    m.train()
    optimizer = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(4, 16, 6, 6, generator=torch.Generator().manual_seed(5))
    m(x).square().mean().backward()
    optimizer.step()
    m.eval()


def replace_data_twice(m):
    """The second tensor may take the memory that the first has left."""
    for _ in range(2):
        m.conv1.weight.data = m.conv1.weight.data * 2


def fresh_conv(*args, **kwargs):
    conv = nn.Conv2d(*args, **kwargs).eval()
    with torch.no_grad():
        for i, p in enumerate(conv.parameters()):
            p.copy_(fill(p, i))
    return conv


def plain_attribute(m):
    weight = m.conv1.weight.detach().clone()
    del m.conv1.weight
    m.conv1.weight = weight * 2


def dilate(m):
    m.conv2.dilation = m.conv2.padding = (2, 2)


def halve(m):
    m.conv1.stride = (2, 2)
    m.downsample = nn.Sequential(fresh_conv(16, 16, 1, stride=2), nn.BatchNorm2d(16)).eval()


def narrow_between(m):
    """Structured pruning: fewer channels between the convolutions, as the weights alone say."""
    for name in ("weight", "bias"):
        setattr(m.conv1, name, nn.Parameter(getattr(m.conv1, name)[:8].detach()))
        setattr(m.bn1, name, nn.Parameter(getattr(m.bn1, name)[:8].detach()))
    for name in ("running_mean", "running_var"):
        setattr(m.bn1, name, getattr(m.bn1, name)[:8])
    m.conv2.weight = nn.Parameter(m.conv2.weight[:, :8].detach())


FUSED_AFTERWARDS = {
    "weight in place": lambda m: m.conv1.weight.mul_(2),
    "second weight in place": lambda m: m.conv2.weight.add_(0.1),
    "one element": lambda m: m.conv2.weight[0, 0, 0, 0].fill_(5),
    "through a view": lambda m: m.conv1.weight.view(-1)[3:400].zero_(),
    "bias in place": lambda m: m.conv1.bias.add_(1),
    "bn weight": lambda m: m.bn1.weight.neg_(),
    "bn bias": lambda m: m.bn2.bias.add_(1),
    "running mean": lambda m: m.bn1.running_mean.add_(1),
    "running var": lambda m: m.bn2.running_var.mul_(4),
    "load_state_dict": lambda m: m.load_state_dict({k: fill(v).abs() for k, v in m.state_dict().items()}),
    "load_state_dict, assigning": lambda m: m.load_state_dict(
        {k: fill(v).abs() for k, v in m.state_dict().items()}, assign=True
    ),
    "parameter replaced": lambda m: setattr(m.conv1, "weight", nn.Parameter(fill(m.conv1.weight))),
    "buffer replaced": lambda m: setattr(m.bn1, "running_mean", fill(m.bn1.running_mean)),
    "data replaced": lambda m: setattr(m.conv1.weight, "data", fill(m.conv1.weight)),
    "data replaced twice": replace_data_twice,
    "bias taken away": lambda m: setattr(m.conv1, "bias", None),
    "bn weight taken away": lambda m: setattr(m.bn1, "weight", None),
    "child replaced": lambda m: setattr(m, "conv1", fresh_conv(16, 16, 3, padding=1)),
    "kernel replaced": lambda m: setattr(m, "conv1", fresh_conv(16, 16, 5, padding=2, bias=False)),
    "batch norm replaced": lambda m: setattr(m, "bn1", nn.BatchNorm2d(16).eval()),
    "eps": lambda m: setattr(m.bn1, "eps", 0.5),
    "stride": halve,
    "padding": lambda m: (setattr(m.conv1, "padding", (0, 0)), setattr(m.conv2, "padding", (2, 2))),
    "projection added": lambda m: setattr(
        m, "downsample", nn.Sequential(fresh_conv(16, 16, 1), nn.BatchNorm2d(16)).eval()
    ),
    "projection without norm": lambda m: setattr(m, "downsample", nn.Sequential(fresh_conv(16, 16, 1))),
    "a step of training": lambda m: torch.enable_grad()(sgd_step)(m),
    "statistics of training": lambda m: (m.train(), m(torch.ones(4, 16, 6, 6)), m.eval()),
    "apply": lambda m: m.apply(lambda c: c.reset_parameters() if isinstance(c, nn.BatchNorm2d) else None),
    "relu in place": lambda m: (setattr(m, "relu1", nn.ReLU(inplace=True)), m.conv1.weight.mul_(2)),
    "channels_last weights": lambda m: (m.to(memory_format=torch.channels_last), m.conv1.weight.mul_(2)),
    "fewer channels between": narrow_between,
    "pruned for good": lambda m: (
        prune.random_unstructured(m.conv1, "weight", 0.5),
        m.conv1.weight_mask.copy_((fill(m.conv1.weight_mask) > 0).float()),
        prune.remove(m.conv1, "weight"),
        m.conv1.weight.mul_((fill(m.conv1.weight) > 0).float()),
    ),
}

UNFUSED_AFTERWARDS = {
    "dilation": (dilate, "dilation"),
    "padding mode": (lambda m: setattr(m.conv1, "padding_mode", "circular"), "padding mode 'circular'"),
    "groups": (lambda m: setattr(m, "conv2", fresh_conv(16, 16, 3, padding=1, groups=4)), "4 groups"),
    "activation replaced": (lambda m: setattr(m, "relu1", nn.Sigmoid()), "Sigmoid"),
    "last activation replaced": (lambda m: setattr(m, "relu2", nn.LeakyReLU(0.5)), "LeakyReLU"),
    "projection with more in it": (
        lambda m: setattr(m, "downsample", nn.Sequential(fresh_conv(16, 16, 1), nn.BatchNorm2d(16), nn.Tanh()).eval()),
        "Tanh",
    ),
    "projection by pooling": (
        lambda m: setattr(m, "downsample", nn.Sequential(nn.AvgPool2d(1), fresh_conv(16, 16, 1))),
        "AvgPool2d",
    ),
    "projection of another kind": (lambda m: setattr(m, "downsample", nn.AvgPool2d(3, 1, 1)), "AvgPool2d"),
    "batch norm that goes on": (lambda m: m.bn1.train(), "training mode"),
    "weight norm": (lambda m: (parametrizations.weight_norm(m.conv1), scale_first(m)), "ParametrizedConv2d"),
    "pruning": (
        lambda m: (
            prune.random_unstructured(m.conv1, "weight", 0.5),
            m.conv1.weight_mask.copy_((fill(m.conv1.weight_mask) > 0).float()),
        ),
        "not a parameter",
    ),
    "instance norm": (lambda m: setattr(m, "bn1", nn.InstanceNorm2d(16)), "InstanceNorm2d"),
    "weight as a plain attribute": (plain_attribute, "parameter"),
    "forward of its own": (lambda m: setattr(m.bn1, "forward", lambda x: x * 2), "forward of its own"),
    "hook on a child": (lambda m: m.conv1.register_forward_hook(lambda *a: a[2] * 2) and None, "hook on a Conv2d"),
    "pre-hook on a child": (
        lambda m: m.bn1.register_forward_pre_hook(lambda _, x: (x[0] * 2,)) and None,
        "hook on a BatchNorm2d",
    ),
}


def scale_first(m):
    m.conv1.parametrizations.weight.original0.mul_(2)


def check(fast, eager, change, x):
    before = fast(x)
    for m in (fast, eager):
        torch.manual_seed(0)  # for dropout and for pruning
        change(m)
    torch.manual_seed(0)
    after = fast(x)
    assert after.shape != before.shape or not torch.equal(after, before)
    return after

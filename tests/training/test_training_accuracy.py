"""Whole networks in training: at most twice the error of the worse of eager's layouts, in the middle of several draws.

Single draws scatter by a fifth. Eager sums up its statistics in a part for each thread and errs least with many: there
the rule is the hardest.
"""

import copy
from statistics import median

import pytest
import torch
from helpers.support import EAGER_LAYOUTS, numbers, rms

import resnet_fast
from resnet_fast import backends, blocks, reference
from resnet_fast.chain import cpu_algorithm as choose

THREADS = 16
DRAWS = 9


@pytest.fixture(autouse=True)
def many_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def networks(name):
    if name == "BasicBlock(3, 48)":
        return blocks.BasicBlock(3, 48), reference.BasicBlock(3, 48)
    return getattr(resnet_fast, name)(), getattr(reference, name)()


def step(m, x, grad):
    """The last feature map, then the gradients of the input, of all filters and of all vectors."""
    m = copy.deepcopy(m).train()
    x = x.clone().requires_grad_()
    y = getattr(m, "features", m)(x)
    if grad is None:
        return [y.detach()]
    y.backward(grad.to(y.dtype))
    grads = [p.grad for p in m.parameters() if p.grad is not None]
    return [y.detach(), x.grad, [g for g in grads if g.dim() == 4], [g for g in grads if g.dim() == 1]]


def relative_error(found, exact):
    """Of tensors together, each in units of its own size: the small ones count, too."""
    if isinstance(exact, torch.Tensor):
        found, exact = [found], [exact]
    return max(rms([rms(numbers(f) - numbers(e)) / rms(numbers(e)) for f, e in zip(found, exact, strict=True)]), 1e-30)


def ratios(name, batch, size, backward):
    """Our error over the worse of eager's, of each thing that a step gives."""
    fast, eager = networks(name)
    eager.load_state_dict(fast.state_dict())
    x, grad = torch.randn(batch, 3, size, size), None
    if backward:
        with torch.no_grad():
            grad = torch.randn_like(step(eager, x, None)[0])
    exact = step(copy.deepcopy(eager).double(), x.double(), grad)
    with backends.use("cpu"):
        ours = step(fast, x, grad)
    layouts = [(copy.deepcopy(eager).to(memory_format=m), x.contiguous(memory_format=m)) for m in EAGER_LAYOUTS]
    theirs = [step(model, image, grad) for model, image in layouts]
    return [
        relative_error(own, e) / max(relative_error(other, e) for other in others)
        for own, e, *others in zip(ours, exact, *theirs, strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "batch", "size", "backward"),
    [
        ("BasicBlock(3, 48)", 1, 7, True),
        ("BasicBlock(3, 48)", 1, 8, True),
        ("BasicBlock(3, 48)", 1, 16, True),
        ("BasicBlock(3, 48)", 8, 16, True),
        ("cifar_resnet20", 2, 16, True),
        ("cifar_resnet20", 1, 32, False),
        ("cifar_resnet20", 8, 32, False),  # by Winograd in its first stage
    ],
)
def test_twice_the_error_of_eager(name, batch, size, backward):
    names = ("map", "gradient of x", "gradients of filters", "gradients of vectors")
    found = zip(*(ratios(name, batch, size, backward) for _ in range(DRAWS)), strict=True)
    middle = {what: round(float(median(each)), 2) for what, each in zip(names, found, strict=False)}
    assert max(middle.values()) <= 2, middle


def chosen(channels, out_channels, batch, size, dtype=torch.float32, backward=False):
    weight, x = torch.empty(out_channels, channels, 3, 3), torch.empty(batch, channels, size, size, dtype=dtype)
    return choose.training_algorithm(weight.to(dtype), [1, 1], x, backward)


@pytest.mark.parametrize("backward", [False, True])
def test_winograd_is_for_maps_of_many_values(backward):
    """Up to 65,536 values a convolution in training is direct; those that take the time of a step are beyond."""
    few, many = ((16, 4, 32), (64, 16, 8), (256, 1, 16)), ((16, 8, 32), (64, 32, 8), (64, 1, 56), (512, 8, 7))
    for channels, batch, size in few:
        assert chosen(channels, channels, batch, size, backward=backward) == choose.DIRECT
    for channels, batch, size in many:
        assert chosen(channels, channels, batch, size, backward=backward) != choose.DIRECT


def test_winograd_is_for_sums_over_many_channels():
    """Of fewer than 16 channels it errs more than three times as much as eager."""
    for channels in (3, 8, 12, 15):
        assert choose.algorithm(channels, 64, (3, 3), (1, 1), 128, (32, 32)) == choose.DIRECT
        assert chosen(channels, 64, 128, 32) == choose.DIRECT
    assert choose.algorithm(16, 64, (3, 3), (1, 1), 128, (32, 32)) == choose.WINOGRAD

"""What is kept for the backward pass: hooks that pack and unpack it, and changes in place before it is read."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.support import channels_last, twins
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import resnet_fast
from resnet_fast import backends, blocks, models, ops, reference
from resnet_fast.chain.pooling import MaxPool2d


def reversed_strides(t):
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def with_gaps(t):
    return torch.stack([t, t], -1)[..., 0]


HOOKS = {
    "save_on_cpu": save_on_cpu,
    "contiguous": lambda: saved_tensors_hooks(lambda t: t.contiguous(), lambda t: t),
    "reversed strides": lambda: saved_tensors_hooks(lambda t: t, reversed_strides),
    "gaps": lambda: saved_tensors_hooks(lambda t: t.detach().clone(), with_gaps),
    "numpy": lambda: saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy),
}


def module_pair(name):
    """A module, its eager twin, and an input."""
    if name == "MaxPool2d":
        return MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1), torch.randn(2, 8, 9, 7)
    if name == "foreign":
        eager = reference.BasicBlock(8, 8)
        return resnet_fast.fuse(eager), eager, torch.randn(2, 8, 6, 5)
    if name in ("CifarResNet", "ResNet"):
        args, size = ((1,), 8) if name == "CifarResNet" else (([1, 1, 1, 1], 10), 34)
        return *twins(getattr(models, name), getattr(reference, name), *args), torch.randn(2, 3, size, size)
    return *twins(getattr(blocks, name), getattr(reference, name), 8, 16, 1), torch.randn(2, 8, 6, 5)


def gradients(module, x, hooks=contextlib.nullcontext, change=None):
    """Of x and of the parameters; ``change(x, y)`` comes between forward and backward."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    given = x * 1  # no leaf: it may be changed
    with hooks():
        y = module(given)
    if change is not None:
        with torch.no_grad():
            change(given, y)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [x.grad, *(p.grad for p in module.parameters())]


def assert_close(ours, theirs):
    """Of the largest, because the gradient of a bias before batch norm is zero but for rounding."""
    scale = max(b.norm() for b in theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-5 * scale


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("module", ["Block", "Bottleneck", "CifarResNet", "foreign", "MaxPool2d"])
def test_hooks_in_training(module, recompute, hooks, monkeypatch):
    fast, eager, x = module_pair(module)
    monkeypatch.setattr(backends.training, "recompute_outputs", recompute)
    with backends.use("cpu"):
        ours = gradients(fast.train(), x, HOOKS[hooks])
        assert_close(ours, gradients(copy.deepcopy(fast), x))
    assert_close(ours, gradients(eager.train(), x, HOOKS[hooks]))


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("module", ["Block", "CifarResNet", "foreign"])
def test_hooks_in_eval_mode(module, hooks):
    fast, eager, x = module_pair(module)
    with backends.use("cpu"):
        ours = gradients(fast.eval(), x, HOOKS[hooks])
    assert_close(ours, gradients(eager.eval(), x, HOOKS[hooks]))


@pytest.mark.parametrize("hooks", HOOKS)
def test_hooks_of_operators(hooks):
    weight, bias = torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True)
    x, statistics = torch.randn(2, 3, 6, 5), [torch.randn(4), torch.rand(4) + 0.5]

    class Operators(nn.Module):
        def forward(self, x):
            y = ops.conv_bn_relu(x, weight, bias, None, None, *statistics, padding=1)
            return ops.add_relu(y, y.flip(3))

    ours = gradients(Operators(), x, HOOKS[hooks])
    y = F.relu(F.batch_norm(F.conv2d(x := x.requires_grad_(), weight, bias, padding=1), *statistics))
    y = F.relu(y + y.flip(3))
    (theirs,) = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), x)
    assert_close(ours, [theirs])


@pytest.mark.parametrize("hooks", HOOKS)
def test_hooks_of_the_operator_that_compiled_networks_train_by(hooks):
    fast, eager, x = module_pair("Block")
    fast.train()(x)
    program = fast._program

    class Compiled(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = fast

        def forward(self, x):
            tensors = [
                t for conv, bn in program.pairs for t in (conv.weight, conv.bias, bn.weight, bn.bias, None, None)
            ]
            return program._traced(x, tensors)[0]

    assert_close(gradients(Compiled(), x, HOOKS[hooks]), gradients(eager.train(), x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_and_hooks_together(reentrant):
    fast, eager, x = module_pair("Block")

    class Checkpointed(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=reentrant)

    ours, theirs = (gradients(Checkpointed(m.train()), x, HOOKS["contiguous"]) for m in (fast, eager))
    assert_close(ours, theirs)


def changes(module):
    """Between forward and backward: of the input, the result, and each tensor of the module."""
    found = {"input": lambda x, y: x.add_(1), "result": lambda x, y: y.mul_(2)}
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        if t.is_floating_point() and (name.startswith("layer2.0.conv1") or not name.startswith("layer")):
            found[name] = lambda x, y, t=t: t.mul_(1.5)
    return found


def gradients_or_error(module, x, change):
    try:
        return gradients(module, x, change=change)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return str(error)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("module", ["BasicBlock", "CifarResNet"])
def test_changes_raise_or_change_no_gradient(module, training, layout):
    """Where eager raises, so does the fused module, unless it has kept a copy, and its gradients are right."""
    raised, wanted = set(), None
    for name in changes(module_pair(module)[0]):
        torch.manual_seed(0)
        fast, eager, x = module_pair(module)
        x = x.contiguous(memory_format=layout)
        fast, eager = fast.train(training), eager.train(training)
        if wanted is None:
            wanted = gradients(copy.deepcopy(eager), x)
        eagers, ours = (gradients_or_error(m, x, changes(m)[name]) for m in (eager, fast))
        if isinstance(ours, str):
            raised.add(name)
            # Eager keeps no bias, which the fused module keeps with the other parameters.
            assert isinstance(eagers, str) or name.endswith("bias"), name
        elif name != "result":
            assert_close(ours, wanted)
    assert len(raised) >= 4, raised
    if layout == torch.channels_last:
        assert {"input", "conv1.weight", "bn1.weight"} <= raised
    if not training:
        assert {"bn1.running_mean", "bn1.running_var"} <= raised


def test_statistics_that_move_on_before_the_backward_pass_raise():
    """Eager PyTorch goes on, with gradients by the statistics of the second pass."""
    fast, _ = twins(models.CifarResNet, reference.CifarResNet, 1)
    x = torch.randn(2, 3, 8, 8)
    y = fast.eval()(x)
    fast.train()(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    first, second = fast(x), fast(x * 2)
    (first + second).sum().backward()


def test_results_of_inference_may_be_changed_in_place():
    fast, _ = twins(models.CifarResNet, reference.CifarResNet, 1)
    x = channels_last(torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        first = fast.features(x).clone()
        fast.features(x).zero_()
        assert torch.equal(fast.features(x), first)

"""A CIFAR network on a few images runs as one operator on the CPU: the same bits as stage by stage, never stale."""

import copy

import pytest
import torch
from helpers.support import exact_kernels, randomize_
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fast
from resnet_fast import backends


class Calls(TorchDispatchMode):
    """Names of the operators of this library that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "resnet_fast":
            self.names.append(op._opname)
        return op(*args, **(kwargs or {}))


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return randomize_(resnet_fast.cifar_resnet20()).to(dtype).eval()


def by_stages(model, x):
    model.small_batch = 0
    try:
        return model(x)
    finally:
        del model.small_batch


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_same_bits_as_stage_by_stage(batch, dtype):
    """Layers of float32 alone are the same whatever they are chained with; bfloat16 is rounded between operators."""
    model, x = network(dtype), torch.randn(batch, 3, 32, 32).to(dtype)
    if dtype == torch.bfloat16:
        exact = network(torch.float64)(x.double())
        assert (model(x) - exact).norm() <= 2 * (by_stages(model, x) - exact).norm()
    else:
        assert torch.equal(model(x), by_stages(model, x))


@torch.no_grad()
@pytest.mark.parametrize(("batch", "calls"), [(1, 1), (4, 1), (5, 4)])
def test_one_operator_for_a_few_images(batch, calls):
    model, x = network(), torch.randn(batch, 3, 32, 32)
    model(x)
    with Calls() as seen:
        model(x)
    assert seen.names == ["conv_chain"] * calls


@torch.no_grad()
def test_changes_are_seen():
    model, x = network(), torch.randn(1, 3, 32, 32)
    before = model(x)
    model.layer2[1].conv2.weight.mul_(2)
    changed = model(x)
    assert not torch.equal(changed, before)
    assert torch.equal(changed, by_stages(model, x))
    model.layer3[0].bn1.running_mean = torch.ones(64)
    assert torch.equal(model(x), by_stages(model, x))
    model.small_batch = 0
    assert not torch.equal(model(x), changed)


@torch.no_grad()
def test_a_hook_inside_leaves_the_other_stages_fused():
    model, x = network(), torch.randn(1, 3, 32, 32)
    y = model(x)
    seen = []
    model.layer2[1].conv2.register_forward_hook(lambda *_: seen.append(1))
    backends.fallbacks(clear=True)
    torch.testing.assert_close(model(x), y)
    assert seen == [1]
    with Calls() as calls:
        model(x)
    assert "conv_chain" in calls.names
    assert any("hook" in reason for reason in backends.fallbacks())


def functions(y):
    """Names of the backward nodes behind ``y``."""
    nodes, names = [y.grad_fn], []
    while nodes:
        node = nodes.pop()
        names.append(node.name())
        nodes += [following for following, _ in node.next_functions if following is not None]
    return names


def test_training_is_one_autograd_function():
    model, x = network().train(), torch.randn(3, 3, 32, 32)
    assert functions(model(x)).count("_TrainBackward") == 1
    mine = copy.deepcopy(model)
    mine.__class__ = type("Mine", (resnet_fast.CifarResNet,), {})
    assert functions(mine(x)).count("_TrainBackward") == 4
    mine.load_state_dict(model.state_dict())
    for m in (model, mine):
        m(x).square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)
    for a, b in zip(model.buffers(), mine.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_training_after_changes():
    model, x = network().train(), torch.randn(3, 3, 32, 32)
    model(x)
    model.layer2[1].bn1.eval()
    y = model(x)
    assert functions(y).count("_TrainBackward") == 1
    with backends.use("eager"):
        torch.testing.assert_close(y, model(x), rtol=1e-3, atol=1e-3)
    seen = []
    model.layer2[1].conv2.register_forward_hook(lambda *_: seen.append(1))
    assert functions(model(x)).count("_TrainBackward") > 3
    assert seen == [1]


def test_gradients_and_other_classes_go_stage_by_stage():
    model, x = network(), torch.randn(1, 3, 32, 32)

    def names(net):
        with Calls() as calls:
            net(x)
        return calls.names

    assert len(names(model)) > 1  # weights want gradients
    with torch.no_grad():
        model(x)
        assert names(model) == ["conv_chain"]
        with backends.use("eager"):
            assert names(model) == []
        model.__class__ = type("Mine", (resnet_fast.CifarResNet,), {})
        assert names(model).count("conv_chain") == 4


@torch.no_grad()
def test_the_switch_for_winograd_is_seen():
    with exact_kernels():
        model, x = network(), torch.randn(1, 3, 32, 32)
        assert torch.equal(model(x), by_stages(model, x))

"""Gradients of the operators, which are eager's behind a fused forward, and of modules in eval mode."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.support import (
    EAGER_LAYOUTS,
    OPS,
    WINOGRAD_FACTOR,
    Case,
    NoWildGradients,
    assert_error_rule,
    random_case,
    twins,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from resnet_fast import backends, blocks, ops, reference
from resnet_fast.ops.conv_gradient import convolution_backward


def test_eval_leaves_the_statistics():
    fast, _ = twins(blocks.BasicBlock, reference.BasicBlock, 8, 8)
    before = copy.deepcopy(fast.state_dict())
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    fast(x).sum().backward()
    assert all(torch.equal(before[k], v) for k, v in fast.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["Block", "BasicBlock", "Bottleneck"])
def test_gradients_of_blocks_in_eval_mode(kind, stride, dtype):
    fast, eager = (m.to(dtype) for m in twins(getattr(blocks, kind), getattr(reference, kind), 16, 24, stride))
    x = torch.randn(3, 16, 7, 9).to(dtype)
    with torch.no_grad():
        grad = torch.randn_like(eager(x))
    with backends.use("cpu"):
        ours = gradients(fast, x, grad)
    exact = gradients(copy.deepcopy(eager).double(), x.double(), grad.double())
    theirs = [
        gradients(copy.deepcopy(eager).to(memory_format=layout), x.contiguous(memory_format=layout), grad)
        for layout in EAGER_LAYOUTS
    ]
    names = ["output", "x", *(k for k, _ in fast.named_parameters())]
    for i, name in enumerate(names):
        assert_error_rule(ours[i], exact[i], [t[i] for t in theirs], name, WINOGRAD_FACTOR)


def gradients(m, x, grad):
    x = x.detach().clone().requires_grad_()
    y = m(x)
    return [y, *torch.autograd.grad(y, [x, *m.parameters()], grad)]


@pytest.mark.parametrize("frozen", ["x", "everything but x", "batch norms", "all but one"])
def test_only_the_gradients_that_are_asked_for(frozen):
    fast, eager = twins(blocks.BasicBlock, reference.BasicBlock, 16, 16)
    x = torch.randn(2, 16, 6, 6)
    for m in (fast, eager):
        if frozen == "everything but x":
            m.requires_grad_(False)
        elif frozen == "batch norms":
            m.bn1.requires_grad_(False)
            m.bn2.requires_grad_(False)
        elif frozen == "all but one":
            m.requires_grad_(False)
            m.conv2.weight.requires_grad_(True)
    leaves = []
    for m in (fast, eager):
        own = x.clone().requires_grad_(frozen != "x")
        m(own).square().mean().backward()
        leaves.append([own.grad, *(p.grad for p in m.parameters())])
    for ours, theirs in zip(*leaves, strict=True):
        assert (ours is None) == (theirs is None)
        # The loss squares an output that differs by some eps.
        assert ours is None or torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "between",
    [
        lambda m: m.train(),
        lambda m: setattr(m, "conv1", nn.Identity()),
        lambda m: setattr(m.conv1, "weight", nn.Parameter(torch.zeros(16, 16, 3, 3))),
        lambda m: setattr(m.bn1, "eps", 0.5),
        lambda m: setattr(m.bn1, "running_mean", torch.ones(16)),
        lambda m: m.bn2.register_forward_hook(lambda *_: pytest.fail("called by the backward pass")),
    ],
)
def test_the_backward_pass_belongs_to_the_forward_pass(between):
    """What is done to the module in between changes neither the gradients nor the module."""
    fast, eager = twins(blocks.Block, reference.Block, 16, 16, 1)
    x = torch.randn(2, 16, 6, 6)
    results = []
    for m in (fast, eager):
        own, weights = x.clone().requires_grad_(), list(m.parameters())
        y = m(own)
        between(m)
        state = copy.deepcopy(m.state_dict())
        grads = torch.autograd.grad(y, [own, *weights], torch.ones_like(y))
        assert all(torch.equal(state[k], v) for k, v in m.state_dict().items())
        results.append(grads)
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["conv1.weight", "bn1.running_mean", "bn2.running_var", "x"])
def test_changes_in_place_before_the_backward_pass_raise(what):
    """As eager's do: what the backward pass needs is gone."""
    for m in twins(blocks.Block, reference.Block, 16, 16, 1):
        x = torch.randn(2, 16, 6, 6)
        y = m(x)
        with torch.no_grad():
            (x if what == "x" else m.state_dict(keep_vars=True)[what]).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_backward_twice_and_retained():
    fast, _ = twins(blocks.BasicBlock, reference.BasicBlock, 16, 16)
    x = torch.randn(2, 16, 6, 6, requires_grad=True)
    loss = fast(x).sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_activation_checkpointing(training, use_reentrant):
    fast = blocks.Stage(blocks.BasicBlock(8, 8), blocks.BasicBlock(8, 8)).train(training)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    plain = copy.deepcopy(fast)
    plain(x).square().sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(fast, x, use_reentrant=use_reentrant).square().sum().backward()
    # The first run of a reentrant one wants no gradient: in eval mode its kernels round elsewhere.
    tolerance = 0 if training or not use_reentrant else 1e-4
    pairs = [
        (x.grad, expected),
        *((a.grad, b.grad) for a, b in zip(fast.parameters(), plain.parameters(), strict=True)),
    ]
    assert all(torch.allclose(a, b, rtol=tolerance, atol=tolerance / 10) for a, b in pairs)


def plain_layer(op, case):
    """Batch norm spelled out: PyTorch's own gives no gradient of the statistics."""
    gamma, beta, mean, var = (None if t is None else t[:, None, None] for t in case.bn)
    y = F.conv2d(
        case.x, case.weight, None if case.bias is None else case.bias.to(case.x.dtype), case.stride, case.padding
    )
    if mean is not None:
        y = (y - mean) * torch.rsqrt(var + case.eps)
        y = y if gamma is None else y * gamma
        y = (y if beta is None else y + beta).to(case.x.dtype)
    if op == "conv_bn_add_relu":
        y = y + case.residual
    return y if op == "conv_bn" else F.relu(y)


def case_gradients(run, case, op, grad, layout=torch.contiguous_format):
    def leaf(t):
        if t is None:
            return None
        t = t.contiguous(memory_format=layout) if t.dim() == 4 else t
        return t.detach().clone().requires_grad_()

    own = Case(
        leaf(case.x),
        leaf(case.residual),
        leaf(case.weight),
        leaf(case.bias),
        tuple(map(leaf, case.bn)),
        case.eps,
        case.stride,
        case.padding,
    )
    wanted = {"x": own.x, "weight": own.weight, "bias": own.bias}
    wanted |= dict(zip(("bn_weight", "bn_bias", "running_mean", "running_var"), own.bn, strict=True))
    if op == "conv_bn_add_relu":
        wanted["residual"] = own.residual
    wanted = {k: v for k, v in wanted.items() if v is not None}
    y = run(op, own)
    return dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad), strict=True))


def fused(op, case):
    return case.fused(op)


@pytest.mark.parametrize("bn", ["bn", "none", "affine=False"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 16, (8, 8), 16, 3, 1, 1),
        (2, 17, (7, 9), 3, 3, 2, 1),
        (3, 3, (9, 9), 16, 1, 2, 0),
        (1, 1, (5, 5), 65, 5, 1, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", OPS)
def test_gradients_of_the_operators(op, shape, dtype, bn):
    case = random_case(*shape, dtype=dtype, bn=bn != "none")
    if bn == "affine=False":
        case.bn = (None, None, *case.bn[2:])
    grad = torch.randn_like(case.residual)
    exact = case_gradients(plain_layer, case.to(torch.float64), op, grad.double())
    eager = [case_gradients(plain_layer, case, op, grad, layout) for layout in EAGER_LAYOUTS]
    ours = case_gradients(fused, case, op, grad)
    for name in exact:
        assert ours[name].dtype == eager[0][name].dtype, name
        assert_error_rule(ours[name], exact[name], [e[name] for e in eager], name)


@pytest.mark.parametrize("mask", [[True, True, True], [False, True, False], [True, False, False]], ids=str)
@pytest.mark.parametrize("stride", [[2, 2], [1, 3]], ids=str)
@pytest.mark.parametrize("channels", [2, 5, 15, 16])
@pytest.mark.parametrize("layout", EAGER_LAYOUTS, ids=str)
def test_gradients_of_strided_1x1_convolutions_of_few_channels(layout, channels, stride, mask):
    """What oneDNN gets wrong is not asked of it. Integers: every sum is exact."""
    x = torch.randint(-3, 4, (3, channels, 8, 6)).float().contiguous(memory_format=layout)
    weight = torch.randint(-3, 4, (7, channels, 1, 1)).float().contiguous(memory_format=layout)
    grad = torch.randint(-3, 4, (3, 7, 8 // stride[0], 6 // stride[1])).float().contiguous(memory_format=layout)
    with NoWildGradients():
        ours = convolution_backward(grad, x, weight, [7], stride, [0, 0], mask)
    tensors = (t.double().contiguous(memory_format=torch.contiguous_format) for t in (grad, x, weight))
    exact = torch.ops.aten.convolution_backward(*tensors, [7], stride, [0, 0], [1, 1], False, [0, 0], 1, mask)
    for value, right, wanted in zip(ours, exact, mask, strict=True):
        assert (value is None) == (not wanted)
        assert value is None or torch.equal(value.double(), right)


@pytest.mark.parametrize("layout", EAGER_LAYOUTS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_operators_do_not_ask_for_gradients_that_overwrite_memory(op, layout):
    case = random_case(3, 5, (8, 6), 16, 1, 2, 0)
    grad = torch.randn_like(case.residual)
    exact = case_gradients(plain_layer, case.to(torch.float64), op, grad.double())
    with NoWildGradients():
        ours = case_gradients(fused, case, op, grad, layout)
    for name, value in ours.items():
        assert torch.allclose(value.double(), exact[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("op", OPS)
def test_first_and_second_derivatives_by_differences(op):
    case = random_case(1, 2, (4, 3), 2, 3, 1, 1, torch.float64)
    leaves = [t.requires_grad_() for t in (*case.images(op), case.weight, case.bias, *case.bn)]

    def run(*tensors):
        return getattr(ops, op)(*tensors, eps=0.1, padding=1)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_an_empty_batch(op):
    case = random_case(0, 3, (5, 5), 4, 3, 1, 1)
    grads = case_gradients(fused, case, op, torch.zeros_like(case.residual))
    for name, grad in grads.items():
        assert not grad.any(), name

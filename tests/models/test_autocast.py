"""Autocast: images and filters in its dtype, as eager's convolutions have it; float64 left alone."""

import copy

import pytest
import torch
from helpers.support import EAGER_LAYOUTS, OPS, assert_error_rule, random_case, twins

import resnet_fast
from resnet_fast import backends, blocks, reference


def autocast(dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16])
def test_operators(op, inputs):
    case = random_case(2, 17, (7, 6), 16, 3, 1, 1)
    case.x = case.x.to(inputs)
    with autocast():
        out = case.fused(op)
        eager = [case.eager(op, layout) for layout in EAGER_LAYOUTS]
    assert out.dtype == torch.bfloat16
    assert_error_rule(out, case.to(torch.float64).eager(op), [e.bfloat16() for e in eager])


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_operators_keep_the_dtypes_of_the_parameters(op):
    case = random_case(2, 17, (7, 6), 16, 3, 1, 1)
    grads = {}
    for kind in ("fused", "eager", "exact"):
        own = case.to(torch.float64 if kind == "exact" else torch.float32)
        leaves = [own.x, own.weight, own.bias, own.bn[0], own.bn[1]]
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        own.x, own.weight, own.bias = leaves[:3]
        own.bn = (*leaves[3:], *own.bn[2:])
        if kind == "exact":
            y = own.eager(op)
        else:
            with autocast():
                y = own.fused(op) if kind == "fused" else own.eager(op)
        grads[kind] = torch.autograd.grad(y.float().square().sum(), leaves)
    for ours, theirs, exact in zip(grads["fused"], grads["eager"], grads["exact"], strict=True):
        assert ours.dtype == torch.float32
        # The rule for bfloat16: float32 gradients of bfloat16 arithmetic, compared with eager's same mixture.
        assert_error_rule(ours, exact, [theirs])


@pytest.mark.parametrize("op", OPS)
def test_float64_is_left_alone(op):
    case = random_case(2, 3, (5, 6), 4, 3, 1, 1, torch.float64)
    plain = case.fused(op)
    with autocast():
        assert torch.equal(case.fused(op), plain)


@pytest.mark.parametrize("op", OPS)
def test_float16_runs_on_the_library(op):
    case = random_case(2, 3, (5, 6), 4, 3, 1, 1)
    with autocast(torch.float16):
        assert torch.equal(case.fused(op), case.eager(op))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("cache", [False, True])
def test_models(grad, cache):
    fast, eager = twins(resnet_fast.cifar_resnet20, reference.cifar_resnet20)
    x = torch.randn(2, 3, 16, 16)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, cache_enabled=cache), backends.use("cpu"):
        out = fast.features(x)
    results = []
    with torch.no_grad(), autocast():
        results += [
            copy.deepcopy(eager).to(memory_format=layout).features(x.contiguous(memory_format=layout))
            for layout in EAGER_LAYOUTS
        ]
    assert out.dtype == results[0].dtype == torch.bfloat16
    assert_error_rule(out, eager.double().features(x.double()), results)
    assert backends.fallbacks() == {}


@pytest.mark.parametrize("kind", ["Block", "BasicBlock", "Bottleneck"])
def test_gradients_of_blocks(kind):
    fast, eager = twins(getattr(blocks, kind), getattr(reference, kind), 16, 16, 2)
    x = torch.randn(2, 16, 8, 8)
    grads = []
    for m, dtype in ((fast, torch.float32), (eager, torch.float32), (copy.deepcopy(eager).double(), torch.float64)):
        own = x.detach().clone().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            y = m(own)
        y.double().square().sum().backward()  # outside of autocast, as is usual
        grads.append([own.grad, *(p.grad for p in m.parameters())])
    for ours, theirs, exact in zip(*grads, strict=True):
        assert ours.dtype == torch.float32
        assert_error_rule(ours, exact, [theirs])


def test_autocast_comes_and_goes():
    fast, eager = twins(blocks.BasicBlock, reference.BasicBlock, 16, 16)
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        first = fast(x)
        with autocast():
            assert fast(x).dtype == torch.bfloat16
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(fast(x), first)
        assert torch.equal(fast(x), first)
        with autocast(torch.float16):
            assert torch.equal(fast(x), eager(x))
    assert any("float16" in key for key in backends.fallbacks())


def test_compiled_under_autocast():
    fast, eager = twins(blocks.BasicBlock, reference.BasicBlock, 16, 16)
    x = torch.randn(2, 16, 8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), autocast():
        out = compiled(x)
        results = [eager(x.contiguous(memory_format=layout)) for layout in EAGER_LAYOUTS]
    assert out.dtype == torch.bfloat16
    with torch.no_grad():
        assert_error_rule(out, eager.double()(x.double()), results)

"""Right calls of the operators against plain PyTorch in float64."""

import functools
import random
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from helpers.support import LAYOUTS, WINOGRAD_FACTOR, assert_error_rule, exact_kernels, numbers, rms

from resnet_fast import backends, ops

from .calls import CONVOLUTIONS, DTYPES, arguments, convolution, laid_out, magnitudes, mapped, meta, plain

# Fewer numbers than these may have eager's error by luck.
ENOUGH = 1024


def check(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice(DTYPES)
    if rng.random() < 0.2:
        check_add_relu(rng, dtype)
    elif rng.random() < 0.5:
        check_integers(rng, dtype)
    else:
        check_rounding(rng, dtype)


def check_add_relu(rng, dtype):
    """One addition and one rounding: the result is eager's, bit for bit, and so are the gradients."""
    dtype = rng.choice((dtype, dtype, torch.float16, torch.int32))
    shape = [rng.choice((0, 1, 2, 3, 5, 8, 17, 33)) for _ in range(rng.randint(0, 5))]
    a, b = ((torch.randn(shape) * 8).to(dtype) for _ in range(2))
    if len(shape) == 4 and dtype.is_floating_point:
        a, b = rng.choice(LAYOUTS)(a), rng.choice(LAYOUTS)(b)
    elif shape and rng.random() < 0.3:
        b = b[:1].expand(shape) if shape[0] else b
    b = a if rng.random() < 0.1 else b
    leaves = [t.requires_grad_() for t in (a, b)] if dtype.is_floating_point else []
    out, expected = ops.add_relu(a, b), F.relu(a + b)
    assert torch.equal(out, expected), "add_relu differs from F.relu(a + b)"
    if leaves:
        grads = [torch.autograd.grad(y, leaves, torch.ones_like(y)) for y in (out, expected)]
        assert all(map(torch.equal, *grads)), "the gradients differ"


def fused(call):
    """Whether a kernel runs: then the result has no rounding but the last, and the layout that is promised."""
    return call["dilation"] in (1, (1, 1), [1, 1]) and call["groups"] == 1


def run(op, call):
    """The operator's result; what holds of every one."""
    given = arguments(op, call)
    before = {k: v.detach().clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    with backends.use("cpu") if fused(call) else nullcontext():
        out = getattr(ops, op)(**given)
    shape = getattr(ops, op)(**meta(given))
    assert (out.shape, out.dtype) == (shape.shape, call["x"].dtype)
    if fused(call):
        assert out.is_contiguous(memory_format=torch.channels_last), f"strides {out.stride()}"
        assert out.stride() == shape.stride(), f"{out.stride()}, but meta tensors promise {shape.stride()}"
    for name, value in before.items():
        assert given[name].detach().equal(value), f"{name} was written to"
    return out


def check_integers(rng, dtype):
    """Sums of small integers are exact: every number is the float64 result, rounded once. And every gradient."""
    op, call = rng.choice(CONVOLUTIONS), convolution(rng, True, dtype)
    exact = plain(op, mapped(call, torch.Tensor.double))
    call = laid_out(rng, call)
    wanted = [k for k, v in arguments(op, call).items() if isinstance(v, torch.Tensor) and rng.random() < 0.5]
    call = mapped(call, lambda t: t.detach().requires_grad_(any(call[k] is t for k in wanted)))
    with exact_kernels():
        out = run(op, call)
    if fused(call) or dtype != torch.bfloat16:
        assert torch.equal(out, exact.to(dtype)), f"{(out != exact.to(dtype)).sum()} of {out.numel()} numbers differ"
        check_gradients(op, call, out, {k: call[k] for k in wanted})
    else:  # eager rounds after every step
        assert_small(out, exact, plain(op, magnitudes(call)), op)


def check_gradients(op, call, out, leaves):
    """Against those of float64; small against the same sums without signs, as rounding errors are."""
    if not leaves or out.numel() == 0:
        return
    grad = torch.randint(-4, 5, out.shape).to(out.dtype)
    ours = torch.autograd.grad(out, list(leaves.values()), grad)

    def gradients(source, grad):
        source = mapped(source, lambda t: t.requires_grad_())
        return torch.autograd.grad(plain(op, source), [source[k] for k in leaves], grad)

    exact = gradients(mapped(call, lambda t: t.detach().double()), grad.double())
    size = gradients(magnitudes(call), grad.double().abs())
    for name, t, e, s in zip(leaves, ours, exact, size, strict=True):
        assert t.dtype == call[name].dtype
        assert_small(t, e, s, f"the gradient of {name}")


def assert_small(out, exact, size, what):
    """rms(error) within 16 roundings of the sums without signs: what no sum in any order comes near, and every wrong
    number is far beyond."""
    error, limit = rms(numbers(out) - numbers(exact)), 16 * torch.finfo(out.dtype).eps * rms(numbers(size))
    assert error <= limit, f"{what}: error {error:.3g}, want at most {limit:.3g}"


def check_rounding(rng, dtype):
    """The error rule, where there are numbers enough for it."""
    op, call = rng.choice(CONVOLUTIONS), convolution(rng, False, dtype)
    exact = plain(op, mapped(call, torch.Tensor.double))
    layouts = (torch.contiguous_format, torch.channels_last)
    eager = [plain(op, mapped(call, functools.partial(image, layout=layout))) for layout in layouts]
    call = laid_out(rng, call)
    if rng.random() < 0.2 and dtype != torch.float64:
        with torch.autocast("cpu", torch.bfloat16):
            out = getattr(ops, op)(**arguments(op, call))
        # Unfused, a sum with a residual in float32 is in float32, as eager's.
        assert out.dtype == torch.bfloat16 or not fused(call)
        assert_small(out.bfloat16(), exact, plain(op, magnitudes(call)), f"{op} under autocast")
        return
    before, backends.cpu.allow_winograd = backends.cpu.allow_winograd, rng.random() < 0.7
    try:
        with rng.choice((torch.no_grad, torch.enable_grad, torch.inference_mode))():
            out = run(op, call)
        factor = WINOGRAD_FACTOR if backends.cpu.allow_winograd else 2
    finally:
        backends.cpu.allow_winograd = before
    assert_small(out, exact, plain(op, magnitudes(call)), op)
    if out.numel() >= ENOUGH and dtype != torch.float64:
        assert_error_rule(out, exact, eager, op, factor)


def image(t, layout):
    return t.contiguous(memory_format=layout) if t.dim() == 4 else t

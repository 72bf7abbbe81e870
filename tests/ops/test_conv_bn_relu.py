"""conv_bn, conv_bn_relu and conv_bn_add_relu: values, layouts, special values, errors."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.support import (
    DTYPES,
    EAGER_LAYOUTS,
    LAYOUTS,
    OPS,
    assert_error_rule,
    exact_kernels,
    integer_case,
    numbers,
    random_case,
)

from resnet_fast import backends, ops

# n, c, size, k, kernel, stride, padding
SHAPES = [
    (1, 1, (1, 1), 1, 1, 1, 0),
    (2, 3, (1, 1), 17, 3, 1, 1),
    (1, 17, (1, 1), 3, 7, 2, 3),
    (2, 16, (8, 8), 16, 3, 1, 1),
    (2, 64, (7, 7), 64, 3, 1, 1),
    (3, 64, (5, 6), 65, 3, 1, 1),
    (1, 65, (6, 5), 64, 3, 2, 1),
    (2, 3, (33, 29), 64, 7, 2, 3),  # the stem
    (2, 3, (13, 11), 16, 3, 1, 1),
    (2, 17, (7, 9), 3, 3, 2, 1),
    (2, 64, (7, 7), 17, 1, 1, 0),
    (2, 16, (9, 7), 65, 1, 2, 0),
    (1, 1, (19, 23), 1, 5, 1, 2),
    (5, 17, (11, 13), 17, 5, 2, 2),
    (1, 16, (31, 2), 32, (3, 1), 1, (1, 0)),
    (2, 3, (5, 17), 17, (1, 7), (1, 2), (0, 3)),
    (2, 17, (8, 9), 16, (2, 4), (2, 1), (1, 2)),
    (2, 3, (4, 4), 16, 3, 1, 4),  # whole windows of padding
    (2, 64, (6, 6), 16, 4, 3, 0),
    (1, 130, (3, 3), 70, 3, 1, 1),
    (9, 16, (4, 4), 24, 3, 1, 1),  # images left over after an even split over threads
    (0, 16, (4, 4), 24, 3, 1, 1),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_rule(op, dtype, shape):
    case = random_case(*shape, dtype=dtype)
    with backends.use("cpu"):
        out = case.fused(op)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_error_rule(out, case.exact(op), [case.eager(op, layout) for layout in EAGER_LAYOUTS])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_integers_are_exact(op, dtype, shape):
    """Sums stay below 4 * 4 * 130 * 9 * 2^2 < 2^24, scales are powers of two: one rounding, at the end."""
    case = integer_case(*shape, dtype=dtype)
    exact = case.to(torch.float64).eager(op)
    with exact_kernels(), backends.use("cpu"):
        assert torch.equal(case.fused(op), exact.to(dtype))


@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[9], SHAPES[10]], ids=str)
def test_float64_error_is_bounded(shape):
    """A sum of n terms in any order errs at most n * eps * sum |terms| (Higham 2002, section 4.2)."""
    case = random_case(*shape, dtype=torch.float64, bias=False, bn=False)
    exact, terms = case.exact("conv_bn"), case.weight[0].numel()
    absolute = case.__class__(case.x.abs(), case.residual, case.weight.abs(), None, (None,) * 4, 0.0, *shape_of(case))
    bound = terms * np.finfo(np.float64).eps * absolute.exact("conv_bn")
    assert np.all(np.abs(numbers(case.fused("conv_bn")) - exact) <= bound)


def shape_of(case):
    return case.stride, case.padding


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [SHAPES[4], SHAPES[8], SHAPES[9], SHAPES[11], SHAPES[16]], ids=str)
def test_layouts(layout, dtype, shape):
    """Any layout of images, residual and weight; the per-channel vectors strided, too."""
    case = integer_case(*shape, dtype=dtype)
    exact = case.to(torch.float64).eager("conv_bn_add_relu").to(dtype)
    case.x, case.residual, case.weight = layout(case.x), layout(case.residual), layout(case.weight)
    case.bias = torch.stack([case.bias, torch.full_like(case.bias, torch.nan)], 1)[:, 0]
    case.bn = tuple(torch.stack([t, torch.full_like(t, torch.nan)], 1)[:, 0] for t in case.bn)
    with exact_kernels(), backends.use("cpu"):
        out = case.fused("conv_bn_add_relu")
    assert torch.equal(out, exact)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("source", [(1, 16, 6, 7), (2, 1, 6, 7), (2, 16, 1, 7), (2, 16, 6, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_expanded_images(source, kernel):
    case = integer_case(2, 16, (6, 7), 16, kernel, 1, kernel // 2)
    case.x = torch.randint(-4, 5, source).float().expand(2, 16, 6, 7)
    case.residual = torch.randint(-4, 5, source).float().expand(2, 16, 6, 7)
    exact = case.to(torch.float64).eager("conv_bn_add_relu").float()
    with exact_kernels():
        assert torch.equal(case.fused("conv_bn_add_relu"), exact)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("channels", "kernel"), [(16, 3), (16, 1), (17, 3), (17, 1)])
def test_residual_is_the_input_itself(channels, kernel, layout):
    case = integer_case(3, channels, (6, 5), channels, kernel, 1, kernel // 2)
    case.x = case.residual = layout(case.x)
    before = case.x.clone()
    exact = case.to(torch.float64).eager("conv_bn_add_relu").float()
    with exact_kernels():
        assert torch.equal(case.fused("conv_bn_add_relu"), exact)
    assert torch.equal(case.x, before)


def test_residual_overlaps_the_input():
    """Two windows of one memory, shifted by a row."""
    case = integer_case(2, 16, (6, 5), 16, 3, 1, 1)
    both = torch.randint(-4, 5, (2, 16, 7, 5)).float()
    case.x, case.residual = both[:, :, :6], both[:, :, 1:]
    with exact_kernels():
        assert torch.equal(case.fused("conv_bn_add_relu"), case.to(torch.float64).eager("conv_bn_add_relu").float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("present", ["bias", "bn", "bn without affine", "bn without bias", "bn without weight", "none"])
def test_optional_arguments(present, dtype):
    case = random_case(2, 17, (7, 7), 19, 3, 1, 1, dtype, bias=present == "bias", bn="bn" in present)
    gamma, beta, mean, var = case.bn
    affine = "affine" not in present
    case.bn = (
        gamma if affine and "weight" not in present else None,
        beta if affine and "bias" not in present.removeprefix("bias") else None,
        mean,
        var,
    )
    for op in OPS:
        out = case.fused(op)
        assert_error_rule(out, case.exact(op), [case.eager(op, layout) for layout in EAGER_LAYOUTS])


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.5])
def test_eps(eps):
    case = random_case(2, 16, (7, 7), 16, 3, 1, 1)
    case.eps = eps
    eager = [case.eager("conv_bn", layout) for layout in EAGER_LAYOUTS]
    assert_error_rule(case.fused("conv_bn"), case.exact("conv_bn"), eager)


def test_bfloat16_vectors():
    """Bias and batch norm may be bfloat16, too: a model after .bfloat16()."""
    case = random_case(2, 16, (7, 7), 16, 3, 1, 1, torch.bfloat16).to(torch.bfloat16)
    eager = [case.eager("conv_bn_relu", layout) for layout in EAGER_LAYOUTS]
    assert_error_rule(case.fused("conv_bn_relu"), case.exact("conv_bn_relu"), eager)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_mean_cancels_in_batch_norm(dtype):
    """A running mean of 1000 deviations: the bias is folded in, the difference must survive as well as eager's."""
    case = random_case(2, 16, (7, 7), 16, 3, 1, 1, dtype)
    case.bias = case.bias + 1000
    gamma, beta, mean, var = case.bn
    case.bn = (gamma, beta, mean + 1000, var)
    eager = [case.eager("conv_bn_relu", layout) for layout in EAGER_LAYOUTS]
    assert_error_rule(case.fused("conv_bn_relu"), case.exact("conv_bn_relu"), eager)


SPECIAL = (torch.nan, torch.inf, -torch.inf, -0.0, 1e-40)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize(("channels", "kernel"), [(16, 3), (17, 3), (16, 1), (3, 1)])
def test_special_values_in_the_images(op, dtype, value, channels, kernel):
    """NaN and infinities reach the same outputs as eager's, and nowhere else; zeros have eager's sign."""
    case = random_case(2, channels, (5, 7), 20, kernel, 1, kernel // 2, dtype)
    case.x[0, channels // 2, 2, 3] = value
    case.x[1, :, 0, 0] = value
    case.residual[0, 4, 1, 1] = value
    case.residual[:, 5] = value
    check_special(case, op)


PARAMETERS = ("weight", "bias", "bn_weight", "bn_bias", "running_mean", "running_var")


# An infinite bn_weight makes folded weights infinite, and inf * 0 or inf - inf where eager has inf * finite: left out.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("where", "value"), [(w, v) for w in PARAMETERS for v in SPECIAL if w != "bn_weight" or abs(v) != torch.inf]
)
def test_special_values_in_the_parameters(where, value, dtype):
    case = random_case(1, 5, (5, 4), 20, 3, 1, 1, dtype)
    if where == "weight":
        case.weight[3, 2, 1, 1] = value
    elif where == "bias":
        case.bias[3] = value
    else:
        case.bn[PARAMETERS.index(where) - 2][3] = value
    check_special(case, "conv_bn_relu")


def check_special(case, op):
    out, *eager = case.fused(op), *(case.eager(op, layout) for layout in EAGER_LAYOUTS)
    out, eager = out.double(), [e.double() for e in eager]
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        agree = test(eager[0]) == test(eager[1])
        assert torch.equal(test(out)[agree], test(eager[0])[agree]), test.__name__
    # Eager's own roundings may give zero where the sum is not; the sign counts where both are zero.
    zero = (out == 0) & (eager[0] == 0) & (eager[1] == 0) & (torch.signbit(eager[0]) == torch.signbit(eager[1]))
    assert torch.equal(torch.signbit(out)[zero], torch.signbit(eager[0])[zero])


@pytest.mark.parametrize("kind", ["zeros", "negative zeros"])
@pytest.mark.parametrize("op", OPS)
def test_signs_of_zero(op, kind):
    case = random_case(1, 3, (4, 4), 16, 3, 1, 1, bias=False, bn=False)
    fill = 0.0 if kind == "zeros" else -0.0
    case.x.fill_(fill)
    case.residual.fill_(fill)
    check_special(case, op)


def good(op="conv_bn_add_relu"):
    return random_case(2, 8, (6, 6), 8, 3, 1, 1)


BROKEN = [
    ("x", {"x": torch.randn(8, 6, 6)}),
    ("x", {"x": torch.randn(1, 2, 8, 6, 6)}),
    ("x", {"x": torch.randn(2, 7, 6, 6)}),
    ("x", {"x": torch.randn(2, 8, 1, 1), "padding": (0, 0)}),
    ("x", {"x": torch.randn(2, 8, 0, 6), "weight": torch.randn(8, 8, 1, 1)}),
    ("x", {"x": torch.randn(2, 8, 6, 0), "weight": torch.randn(8, 8, 1, 1)}),
    ("weight", {"weight": torch.randn(8, 8, 3)}),
    ("weight", {"weight": torch.randn(8, 8, 3, 3, 1)}),
    ("weight", {"weight": torch.randn(0, 8, 3, 3)}),
    ("weight", {"weight": torch.randn(8, 8, 0, 3)}),
    ("weight", {"weight": torch.randn(8, 8, 3, 3).double()}),
    ("weight", {"weight": torch.randn(8, 8, 3, 3).half()}),
    ("weight", {"weight": torch.randn(8, 8, 3, 3, device="meta")}),
    ("residual", {"residual": torch.randn(2, 8, 6, 5)}),
    ("residual", {"residual": torch.randn(2, 7, 6, 6)}),
    ("residual", {"residual": torch.randn(1, 8, 6, 6)}),
    ("residual", {"residual": torch.randn(8, 6, 6)}),
    ("residual", {"residual": torch.randn(2, 8, 6, 6).double()}),
    ("residual", {"residual": torch.randn(2, 8, 6, 6, device="meta")}),
    ("residual", {"x": torch.randn(2, 8, 6, 6, device="meta")}),
    ("bias", {"bias": torch.randn(7)}),
    ("bias", {"bias": torch.randn(8, 1)}),
    ("bias", {"bias": torch.ones(8, dtype=torch.int32)}),
    ("bias", {"bias": torch.randn(8, device="meta")}),
    ("bn_weight", {"bn": (torch.ones(7), None, torch.ones(8), torch.ones(8))}),
    ("bn_bias", {"bn": (None, torch.ones(9), torch.ones(8), torch.ones(8))}),
    ("running_mean", {"bn": (None, None, torch.ones(1), torch.ones(8))}),
    ("running_var", {"bn": (None, None, torch.ones(8), torch.ones(4))}),
    ("running_var", {"bn": (None, None, torch.ones(8), torch.ones(8).half())}),
    ("running_var", {"bn": (None, None, torch.ones(8), torch.ones(8, device="meta"))}),
    ("running_mean", {"bn": (None, None, torch.ones(8), None)}),
    ("running_mean", {"bn": (None, None, None, torch.ones(8))}),
    ("bn_weight", {"bn": (torch.ones(8), None, None, None)}),
    ("bn_bias", {"bn": (None, torch.ones(8), None, None)}),
    ("stride", {"stride": (0, 1)}),
    ("stride", {"stride": (1, -1)}),
    ("padding", {"padding": (-1, 1)}),
    ("padding", {"padding": (1, -2)}),
    ("stride", {"stride": (1, 1, 1)}),
    ("padding", {"padding": (1,)}),
    ("padding", {"padding": "same"}),
    ("stride", {"stride": (1.0, 1.0)}),
    ("stride", {"stride": 1.5}),
    ("dilation", {"dilation": (1, 1, 1)}),
]


@pytest.mark.parametrize(("name", "changes"), BROKEN, ids=[f"{i}-{name}" for i, (name, _) in enumerate(BROKEN)])
def test_errors_name_the_argument(name, changes):
    case, kwargs = good(), {}
    for key, value in changes.items():
        if hasattr(case, key):
            setattr(case, key, value)
        else:
            kwargs[key] = value
    with pytest.raises((RuntimeError, ValueError), match=rf"\b{name}\b"):
        case.fused("conv_bn_add_relu", **kwargs)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_dtypes_that_no_convolution_takes(dtype):
    """No kernel of ours: PyTorch's own operator answers, and backends say who did."""
    with pytest.raises(RuntimeError):
        ops.conv_bn(torch.ones(1, 3, 4, 4, dtype=dtype), torch.randn(4, 3, 3, 3))
    assert any(str(dtype) in key for key in backends.fallbacks())
    with backends.use("cpu"), pytest.raises(RuntimeError, match=str(dtype)):
        ops.conv_bn(torch.ones(1, 3, 4, 4, dtype=dtype), torch.randn(4, 3, 3, 3))


@pytest.mark.parametrize(
    ("kwargs", "reason"), [({"dilation": 2}, "dilation"), ({"dilation": (1, 2)}, "dilation"), ({"groups": 4}, "groups")]
)
@pytest.mark.parametrize("op", OPS)
def test_dilation_and_groups_run_unfused(op, kwargs, reason):
    x, weight = torch.randn(2, 8, 9, 9), torch.randn(8, 8 // kwargs.get("groups", 1), 3, 3)
    mean, var = torch.randn(8), torch.rand(8) + 0.5
    expected = F.batch_norm(F.conv2d(x, weight, None, 1, 1, **kwargs), mean, var, eps=1e-3)
    residual = torch.randn_like(expected)
    expected = expected + residual if op == "conv_bn_add_relu" else expected
    expected = expected if op == "conv_bn" else expected.relu()
    images = (x, residual) if op == "conv_bn_add_relu" else (x,)

    def call():
        return getattr(ops, op)(*images, weight, running_mean=mean, running_var=var, eps=1e-3, padding=1, **kwargs)

    assert torch.equal(call(), expected)
    assert [key for key in backends.fallbacks() if key.startswith(f"{op}:") and reason in key]
    with backends.use("cpu"), pytest.raises(RuntimeError, match=reason):
        call()


def test_float16_runs_unfused():
    x, weight = torch.randn(1, 4, 5, 5).half(), torch.randn(4, 4, 3, 3).half()
    assert torch.equal(ops.conv_bn_relu(x, weight), F.relu(F.conv2d(x, weight)))
    assert backends.fallbacks() == {"conv_bn_relu: no kernel for torch.float16": 1}


def test_meta_tensors_give_shapes():
    case = good()
    case.x, case.residual, case.weight = case.x.to("meta"), case.residual.to("meta"), case.weight.to("meta")
    case.bias, case.bn = case.bias.to("meta"), tuple(t.to("meta") for t in case.bn)
    for op in OPS:
        out = case.fused(op)
        assert out.shape == case.residual.shape
        assert out.is_meta
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC08001, -1])
def test_bfloat16_nan_payloads_stay_nan(bits):
    """Rounding a payload of ones to nearest would carry into infinity or into the sign."""
    case = random_case(1, 3, (4, 4), 16, 3, 1, 1, torch.bfloat16, bn=False)
    case.bias = torch.tensor(bits, dtype=torch.int32).view(torch.float32).expand(16)
    for op in OPS:
        assert case.fused(op).isnan().all()

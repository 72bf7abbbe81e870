"""Operators of training against float64: conv_bn_stats, bn_apply, bn_backward_reduce, channel_sums, conv_backward."""

import pytest
import torch
import torch.nn.functional as F
from helpers.support import WINOGRAD_FACTOR, channels_last, name_of
from helpers.support import assert_error_rule as support_rule
from helpers.training_support import BROKEN, affine, arithmetic, layer, opcheck_arguments, rows

import resnet_fast  # noqa: F401  (registers the operators)

ops = torch.ops.resnet_fast
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# batch, channels, height and width, filters, kernel, stride, padding
SHAPES = [
    (2, 16, (8, 8), 16, (3, 3), (1, 1), (1, 1)),
    (3, 5, (7, 9), 7, (3, 3), (2, 2), (1, 1)),
    (2, 64, (14, 13), 32, (3, 3), (1, 1), (1, 1)),
    (2, 32, (6, 6), 64, (1, 1), (1, 1), (0, 0)),
    (3, 21, (5, 4), 9, (1, 1), (1, 1), (0, 0)),
    (2, 33, (9, 8), 17, (1, 1), (2, 2), (0, 0)),
    (1, 3, (17, 16), 20, (7, 7), (2, 2), (3, 3)),
    (2, 4, (5, 6), 8, (1, 3), (1, 2), (0, 1)),
    (2, 8, (9, 9), 8, (2, 2), (3, 3), (0, 0)),
    (1, 8, (4, 5), 8, (3, 3), (1, 1), (2, 0)),
    (40, 16, (2, 2), 16, (3, 3), (1, 1), (1, 1)),
    (3, 16, (8, 9), 24, (3, 3), (2, 2), (1, 1)),
    (2, 32, (9, 8), 17, (1, 1), (2, 2), (0, 0)),  # pixels that no filter reaches
    (2, 16, (7, 7), 8, (3, 3), (1, 1), (3, 3)),
]


def assert_error_rule(out, exact, eager, what="output", factor=2, roundings=1):
    """The error rule; in float64, which has nothing better to compare with, fifty roundings. Sums that are taken in
    pieces may have a few, where eager happens to have less than one."""
    error = (out.double() - exact).norm() / exact.norm().clamp_min(1e-300)
    if out.dtype == torch.float64:
        assert error <= 50 * torch.finfo(torch.float64).eps, what
    elif error > roundings * torch.finfo(out.dtype).eps / 2:
        support_rule(out, exact, eager, what, factor)


def algorithms(kernel, stride, dtype):
    """Direct, and by Winograd where that can be; for bfloat16 by its own products, too (3 and 4)."""
    winograd = (kernel, stride) == ((3, 3), (1, 1))
    bf16 = ((3, 4) if winograd else (3,)) if dtype == torch.bfloat16 else ()
    return (0, 1, 2, *bf16) if winograd else (0, *bf16)


BF16 = (3, 4)
CASES = [(shape, dtype, a) for shape in SHAPES for dtype in DTYPES for a in algorithms(*shape[4:6], dtype)]


@pytest.mark.parametrize(("shape", "dtype", "algorithm"), CASES, ids=name_of)
def test_conv_bn_stats(shape, dtype, algorithm):
    *_, k, _, stride, padding = shape
    x, weight, scale_shift = layer(*shape, dtype)
    bias = torch.randn(k).to(arithmetic(dtype)) + 3

    def plain(wide, narrow=None):
        a = affine(x.to(wide), scale_shift.to(wide)).relu()
        a, w, b = (t.to(narrow or wide) for t in (a, weight, bias))
        return F.conv2d(a, w, b, stride, padding)

    y, moments = ops.conv_bn_stats(x, scale_shift, True, weight, bias, list(stride), list(padding), algorithm, True)
    # By products of bfloat16 what is normalised is rounded first, as under autocast.
    exact, eager = plain(torch.float64), plain(arithmetic(dtype), dtype if algorithm in BF16 else None)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_error_rule(y, exact, [eager.to(dtype)], factor=WINOGRAD_FACTOR if algorithm in (1, 2) else 2)
    # The statistics are those of the result as it was stored.
    var, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    own_var, own_mean = torch.var_mean(y.to(arithmetic(dtype)), (0, 2, 3), correction=0)
    assert_error_rule(moments[0], mean, [own_mean], "mean", roundings=10)
    assert_error_rule(moments[1], var, [own_var], "variance", roundings=10)


@pytest.mark.parametrize("residual", [None, "plain", "scaled"])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_bn_apply(dtype, relu, residual):
    y, other = (channels_last(torch.randn(3, 19, 5, 7).to(dtype)) for _ in range(2))
    scale_shift, other_scale = rows(2, 19, dtype), rows(2, 19, dtype)

    def plain(wide):
        out = affine(y.to(wide), scale_shift.to(wide))
        if residual is not None:
            out = out + affine(other.to(wide), None if residual == "plain" else other_scale.to(wide))
        return out.relu() if relu else out

    out = ops.bn_apply(
        y, scale_shift, None if residual is None else other, other_scale if residual == "scaled" else None, relu
    )
    assert_error_rule(out, plain(torch.float64), [plain(arithmetic(dtype)).to(dtype)])


@pytest.mark.parametrize("relu_source", [None, "plain", "scaled"])
@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_bn_backward_reduce(dtype, count, relu_source):
    grad, mask, *ys = (channels_last(torch.randn(3, 19, 5, 7).to(dtype)) for _ in range(2 + count))
    scale_shift = rows(2, 19, dtype) - 1
    means = [rows(2, 19, dtype) for _ in ys]
    out, sums = ops.bn_backward_reduce(
        grad, None if relu_source is None else mask, scale_shift if relu_source == "scaled" else None, ys, means
    )
    shown = affine(mask.double(), scale_shift.double() if relu_source == "scaled" else None) > 0
    assert torch.equal(out, grad if relu_source is None else torch.where(shown, grad, 0))

    def plain(wide):
        g = out.to(wide)
        products = [g * (y.to(wide) - m[0].to(wide)[:, None, None]) for y, m in zip(ys, means, strict=True)]
        return [p.sum((0, 2, 3)) for p in (g, *products)]

    assert sums.shape == (3, 19)
    for i, (exact, eager) in enumerate(zip(plain(torch.float64), plain(arithmetic(dtype)), strict=True)):
        assert_error_rule(sums[i], exact, [eager], f"sum {i}", factor=4)


@pytest.mark.parametrize("shape", [(3, 19, 5, 7), (2, 64, 40, 41), (1, 1, 1, 1), (0, 4, 3, 3)], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_channel_sums(dtype, shape):
    grad = channels_last(torch.randn(shape).to(dtype))
    sums, wide = ops.channel_sums(grad), grad.to(arithmetic(dtype))
    assert sums.dtype == wide.dtype
    assert_error_rule(sums, grad.double().sum((0, 2, 3)), [wide.sum((0, 2, 3))], roundings=10)


# The data gradient by products of bfloat16 is for whole vectors of channels.
BACKWARD_CASES = [(shape, dtype, a) for shape, dtype, a in CASES if a not in BF16 or shape[1] % 16 == 0]


@pytest.mark.parametrize(("shape", "dtype", "algorithm"), BACKWARD_CASES, ids=name_of)
def test_conv_backward(shape, dtype, algorithm):
    *_, stride, padding = shape
    x, weight, scale_shift = layer(*shape, dtype)
    y = channels_last(F.conv2d(x.double(), weight.double(), None, stride, padding).to(dtype))
    grad, residual = channels_last(torch.randn(y.shape).to(dtype)), channels_last(torch.randn(x.shape).to(dtype))
    coefficients = rows(4, y.shape[1], dtype)
    means = rows(2, x.shape[1], dtype)

    def plain(wide, narrow=None):
        a, b, constant, mean = (t.to(wide)[:, None, None] for t in coefficients)
        dy = a * grad.to(wide) + b * (y.to(wide) - mean) + constant
        lazy = affine(x.to(wide), scale_shift.to(wide))
        factors = (t.to(narrow or wide) for t in (dy, lazy.relu(), weight))
        dx, dw, _ = torch.ops.aten.convolution_backward(
            *factors, None, stride, padding, [1, 1], False, [0, 0], 1, [True, True, False]
        )
        dx = (dx + residual.to(wide)) * (lazy > 0)
        sums = torch.stack([dx.sum((0, 2, 3)), (dx * (x.to(wide) - means.to(wide)[0][:, None, None])).sum((0, 2, 3))])
        return dx, dw, sums

    settings = (list(stride), list(padding), algorithm)
    rest = (weight, *settings, True, True, residual, True, [x], [means])
    dx, dw, sums = ops.conv_backward(grad, y, coefficients, x, scale_shift, True, *rest)
    exact, eager = plain(torch.float64), plain(arithmetic(dtype), dtype if algorithm in BF16 else None)
    assert_error_rule(dx, exact[0], [eager[0].to(dtype)], "dx", WINOGRAD_FACTOR if algorithm in (1, 2) else 2)
    # The contract for the weight gradient by Winograd, in float32: 5e-6.
    error = (dw.double() - exact[1]).norm() / exact[1].norm()
    least = 5e-6 if algorithm and dtype != torch.float64 else 0.0
    if not error <= least:
        factor = 10 if algorithm in (1, 2) else 2
        assert_error_rule(dw, exact[1], [eager[1].to(dtype)], "dw", factor)
    factor = 8 if dtype == torch.bfloat16 or algorithm else 2  # sums of gradients as they were rounded, or by Winograd
    assert_error_rule(sums[:2], exact[2], [eager[2]], "sums", factor if dtype != torch.bfloat16 else 1e5)
    # Alone, the data's gradient is the same to the bit, the weight's up to the order of its sums: how many images are
    # summed at once depends on the maps that are wanted beside them, and on the number of threads.
    for need_x in (True, False):
        alone = (weight, *settings, need_x, not need_x, residual if need_x else None, need_x, *([x], [means]))
        alone = alone if need_x else (*alone[:8], [], [])
        a, b, c = ops.conv_backward(grad, y, coefficients, x, scale_shift, True, *alone)
        difference = (b.double() - dw.double()).norm()
        assert torch.equal(a, dx) if need_x else difference <= 16 * torch.finfo(dw.dtype).eps * dw.double().norm()
        images, rows_of_sums = (len(x), 3) if need_x else (0, 0)
        assert (a.shape, c.shape) == ((images, *x.shape[1:]), (rows_of_sums, x.shape[1]))


# Few channels, batches without a partner for the last image, many tiles and few, more channels than a block of sums.
WEIGHT_SHAPES = [
    *SHAPES,
    (5, 3, (20, 20), 64, (7, 7), (2, 2), (3, 3)),
    (1, 48, (9, 11), 80, (3, 3), (1, 1), (1, 1)),
    (7, 80, (6, 6), 160, (3, 3), (1, 1), (1, 1)),
    (33, 16, (16, 16), 16, (3, 3), (1, 1), (1, 1)),
]
WEIGHT_CASES = [(shape, a) for shape in WEIGHT_SHAPES for a in algorithms(*shape[4:6], torch.bfloat16) if a in BF16]


@pytest.mark.parametrize(("shape", "algorithm"), WEIGHT_CASES, ids=name_of)
def test_weight_gradient_in_bf16(shape, algorithm):
    *_, stride, padding = shape
    x, weight, scale_shift = layer(*shape, torch.bfloat16)
    y = channels_last(F.conv2d(x.float(), weight.float(), None, stride, padding).bfloat16())
    grad, coefficients = channels_last(torch.randn(y.shape).bfloat16()), rows(4, y.shape[1], torch.bfloat16)

    def plain(narrow):
        a, b, constant, mean = (t[:, None, None] for t in coefficients)
        factors = (a * grad + b * (y - mean) + constant, affine(x, scale_shift).relu())
        d, activation = (t.to(narrow) for t in factors)
        return torch.nn.grad.conv2d_weight(activation, weight.shape, d, stride, padding)

    rest = (list(stride), list(padding), algorithm, False, True, None, False, [], [])
    _, dw, _ = ops.conv_backward(grad, y, coefficients, x, scale_shift, True, weight.float(), *rest)
    assert dw.dtype == torch.float32
    assert_error_rule(dw, plain(torch.float64), [plain(torch.bfloat16)], "dw")


def test_conv_backward_of_a_plain_convolution():
    x, weight, _ = layer(2, 6, (7, 7), 10, (3, 3), (1, 1), (1, 1), torch.float64)
    grad = channels_last(torch.randn(2, 10, 7, 7, dtype=torch.float64))
    dx, dw, _ = ops.conv_backward(
        grad, None, None, x, None, False, weight, [1, 1], [1, 1], 0, True, True, None, False, [], []
    )
    exact = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    assert torch.allclose(dx, exact[0])
    assert torch.allclose(dw, exact[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("op", ["conv_bn_stats", "bn_apply", "bn_backward_reduce", "channel_sums", "conv_backward"])
def test_opcheck(op, dtype):
    torch.library.opcheck(getattr(ops, op), opcheck_arguments(dtype)[op])


def test_they_have_no_gradient_of_their_own():
    x, *rest = opcheck_arguments()["conv_bn_stats"]
    y, _ = ops.conv_bn_stats(x.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match="conv_bn_stats has no gradient of its own"):
        y.sum().backward()


def test_what_the_data_gradient_in_bf16_cannot_do():
    x, weight, _ = layer(2, 5, (7, 7), 8, (3, 3), (1, 1), (1, 1), torch.bfloat16)
    y, _ = ops.conv_bn_stats(x, None, False, weight, None, [1, 1], [1, 1], 3, False)
    rest = ([1, 1], [1, 1], 3, True, False, None, False, [], [])
    with pytest.raises(RuntimeError, match="multiple of 16"):
        ops.conv_backward(y, None, None, x, None, False, weight, *rest)


@pytest.mark.parametrize(("op", "index", "change", "message"), BROKEN, ids=name_of)
def test_broken_arguments(op, index, change, message):
    arguments = list(opcheck_arguments()[op])
    arguments[index] = change(arguments[index])
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, op)(*arguments)

"""A training step beside eager PyTorch's, and arguments of the operators of training, right ones and broken ones."""

import copy

import torch
from helpers.support import EAGER_LAYOUTS, WINOGRAD_FACTOR, NoWildGradients, assert_error_rule, channels_last, unwatched

from resnet_fast import backends

ops = torch.ops.resnet_fast


def step(m, x, grad=None, autocast=False):
    """What a training step computes: output, gradients of x and of the parameters, statistics. Clears the gradients."""
    torch.manual_seed(1)  # of dropout
    m.train()
    m.zero_grad()
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = getattr(m, "logits", m)(x)
    with NoWildGradients():
        y.backward(torch.ones_like(y) if grad is None else grad.to(y.dtype))
    grads = {name: p.grad for name, p in m.named_parameters()}
    return {"output": y.detach(), "x": x.grad} | grads | {k: v.clone() for k, v in m.named_buffers()}


def assert_trains_as_eager(fast, eager, x, grad=None, factor=WINOGRAD_FACTOR, autocast=False, backend="cpu"):
    with backends.use(backend):
        ours = step(fast, x, grad, autocast)
    with unwatched():
        exact = step(copy.deepcopy(eager).double(), x.double(), grad)
        theirs = [
            step(copy.deepcopy(eager).to(memory_format=layout), x.contiguous(memory_format=layout), grad, autocast)
            for layout in EAGER_LAYOUTS
        ]
    assert list(ours) == list(exact)
    for name, value in ours.items():
        if value is None:
            assert theirs[0][name] is None, name
        elif value.is_floating_point():
            assert value.dtype == theirs[0][name].dtype, name
            assert_error_rule(value, exact[name], [t[name] for t in theirs], name, factor)
        else:
            assert torch.equal(value, theirs[0][name]), name
    return ours


def arithmetic(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows(count, channels, dtype):
    return (torch.rand(count, channels, dtype=torch.float64) + 0.5).to(arithmetic(dtype))


def layer(n, c, size, k, kernel, stride, padding, dtype):
    x = channels_last(torch.randn(n, c, *size).to(dtype))
    weight = (torch.randn(k, c, *kernel) / (c * kernel[0] * kernel[1]) ** 0.5).to(dtype)
    scale_shift = rows(2, c, dtype)
    scale_shift[1] -= 1
    return x, weight, scale_shift


def affine(y, scale_shift):
    return y if scale_shift is None else y * scale_shift[0][:, None, None] + scale_shift[1][:, None, None]


def opcheck_arguments(dtype=torch.float32):
    x, weight, scale_shift = layer(2, 5, (6, 7), 8, (3, 3), (1, 1), (1, 1), dtype)
    y = ops.conv_bn_stats(x, None, False, weight, None, [1, 1], [1, 1], 0, True)[0]
    coefficients, moments, in_moments = rows(4, 8, dtype), rows(2, 8, dtype), rows(2, 5, dtype)
    settings = ([1, 1], [1, 1], 0)
    return {
        "conv_bn_stats": (x, scale_shift, True, weight, weight[:, 0, 0, 0].clone(), *settings, True),
        "bn_apply": (y, moments, y, moments, True),
        "bn_backward_reduce": (y, y, moments, [y, y], [moments, moments]),
        "channel_sums": (y,),
        "conv_backward": (
            *(y, y, coefficients, x, scale_shift, True, weight, *settings, True, True, x, True, [x], [in_moments]),
        ),
    }


BROKEN = [
    ("conv_bn_stats", 0, lambda x: x[0], "x has 3 dimensions|x has shape"),
    ("conv_bn_stats", 0, lambda x: x.int(), "x has dtype"),
    ("conv_bn_stats", 0, lambda x: x[:, :4], "channels|scale_shift"),
    ("conv_bn_stats", 0, lambda x: x[:0], "no images"),
    ("conv_bn_stats", 0, lambda x: x[..., :0], "smaller (than the filter|with padding)"),
    ("conv_bn_stats", 1, lambda t: t[:, :3], "scale_shift"),
    ("conv_bn_stats", 1, lambda t: t.double(), "scale_shift"),
    ("conv_bn_stats", 3, lambda w: w.double(), "weight has dtype"),
    ("conv_bn_stats", 4, lambda b: b[:3], "bias"),
    ("conv_bn_stats", 5, lambda _: [0, 1], "stride"),
    ("conv_bn_stats", 6, lambda _: [-1, 1], "padding"),
    ("conv_bn_stats", 7, lambda _: 3, "algorithm is 3"),
    ("bn_apply", 1, lambda t: t[:, :3], "scale_shift"),
    ("bn_apply", 2, lambda t: t[:1], "residual"),
    ("bn_apply", 2, lambda t: t.double(), "residual"),
    ("bn_apply", 3, lambda t: t[:1], "residual_scale_shift"),
    ("bn_backward_reduce", 1, lambda t: t[:1], "relu_source"),
    ("bn_backward_reduce", 3, lambda ys: ys[:1], "1 ys and 2 stats"),
    ("bn_backward_reduce", 3, lambda ys: [ys[0], ys[0][:1]], "ys has shape"),
    ("bn_backward_reduce", 4, lambda ms: [ms[0], ms[0][:, :2]], "stats"),
    ("channel_sums", 0, lambda g: g[0], "grad has"),
    ("channel_sums", 0, lambda g: g.int(), "grad has dtype"),
    ("channel_sums", 0, lambda g: g.contiguous(), "not contiguous in channels_last"),
    ("conv_backward", 0, lambda g: g[:1], "grad"),
    ("conv_backward", 0, lambda g: g.double(), "grad has dtype"),
    ("conv_backward", 1, lambda _: None, "come together"),
    ("conv_backward", 1, lambda y: y[:1], "y has shape"),
    ("conv_backward", 2, lambda t: t[:3], "coefficients"),
    ("conv_backward", 3, lambda x: channels_last(x[..., :3]), "grad"),
    ("conv_backward", 7, lambda _: [2, 2], "grad"),
    ("conv_backward", 9, lambda _: -1, "algorithm is -1"),
    ("conv_backward", 9, lambda _: 3, "algorithm is 3"),
    ("conv_backward", 10, lambda _: False, "reduce without need_x"),
    ("conv_backward", 12, lambda t: t[:1], "residual"),
    ("conv_backward", 14, lambda ys: [ys[0][:1]], "ys has shape"),
]

"""Random calls of the operators, and what plain PyTorch makes of them. A call is a dict: arguments by their names."""

import torch
import torch.nn.functional as F
from helpers.support import LAYOUTS, integer_case, random_case

CONVOLUTIONS = ("conv_bn", "conv_bn_relu", "conv_bn_add_relu")
IMAGES = ("x", "residual", "weight")
VECTORS = ("bias", "bn_weight", "bn_bias", "running_mean", "running_var")
# Around the widths of vectors and of panels, and what divides nothing.
CHANNELS = (1, 2, 3, 4, 7, 8, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def sizes(rng):
    """Channels, image, filters, kernel, stride, padding: of all that a convolution takes, small ones."""
    kernel = tuple(rng.choice((1, 1, 2, 3, 3, 3, 3, 4, 5, 7)) for _ in range(2))
    kernel = (kernel[0],) * 2 if rng.random() < 0.7 else kernel
    stride = tuple(rng.choice((1, 1, 1, 2, 2, 3)) for _ in range(2))
    padding = tuple(rng.choice((0, k // 2, k // 2, k // 2, k - 1, k + 1)) for k in kernel)
    size = tuple(
        rng.randint(max(1, k - 2 * p), rng.choice((8, 8, 20)) + k) for k, p in zip(kernel, padding, strict=True)
    )
    return rng.choice(CHANNELS), size, rng.choice(CHANNELS), kernel, stride, padding


def convolution(rng, integers, dtype):
    """The arguments of a convolution, residual included. ``integers``: sums are exact in float32."""
    c, size, k, kernel, stride, padding = sizes(rng)
    batch = rng.choice((0, 1, 1, 2, 3, 5))
    case = (integer_case if integers else random_case)(batch, c, size, k, kernel, stride, padding, dtype)
    call = {"x": case.x, "weight": case.weight, "bias": case.bias, **dict(zip(VECTORS[1:], case.bn, strict=True))}
    call |= {"eps": case.eps, "stride": stride, "padding": padding, "dilation": (1, 1), "groups": 1}
    if rng.random() < 0.15:
        spare = [s + 2 * p - k for s, p, k in zip(size, padding, kernel, strict=True)]
        call["dilation"] = tuple(
            rng.choice([d for d in (1, 2, 3) if (k - 1) * (d - 1) <= over])
            for k, over in zip(kernel, spare, strict=True)
        )
    if rng.random() < 0.15:
        call["groups"] = rng.choice([g for g in (1, 2, 3, 4, 8, c) if c % g == 0 and k % g == 0])
        call["weight"] = call["weight"][:, : c // call["groups"]]
    leave_out(rng, call)
    shape = plain("conv_bn", meta(call)).shape
    residual = torch.randint(-4, 5, shape).to(dtype) if integers else torch.randn(shape).to(dtype)
    same = shape == call["x"].shape and rng.random() < 0.5
    return repeated(rng, call | {"residual": call["x"] if same else residual})


def repeated(rng, call):
    """Some tensors with strides of zero: one image, pixel or number for all."""
    for name in (*IMAGES, *VECTORS):
        t = call[name]
        if t is not None and t.numel() and rng.random() < 0.07:
            call[name] = t[tuple(slice(None, 1) if rng.random() < 0.5 else slice(None) for _ in t.shape)].expand(
                t.shape
            )
    return call


def leave_out(rng, call):
    """Some of the vectors: the statistics only together, batch norm's own only with them."""
    if rng.random() < 0.3:
        call["bias"] = None
    if rng.random() < 0.3:
        call |= dict.fromkeys(VECTORS[1:])
    for name in ("bn_weight", "bn_bias"):
        if rng.random() < 0.2:
            call[name] = None


def laid_out(rng, call):
    """The same call with other strides, and pairs of equal numbers as one."""
    same, call = call["residual"] is call["x"], dict(call)
    for name in IMAGES:
        if 0 not in call[name].stride():
            call[name] = rng.choice(LAYOUTS)(call[name])
    call["residual"] = call["x"] if same else call["residual"]
    for name in VECTORS:
        if call[name] is not None and call[name].stride() != (0,) and rng.random() < 0.3:
            call[name] = torch.stack([call[name], torch.full_like(call[name], torch.nan)], 1)[:, 0]
    for name in ("stride", "padding", "dilation"):
        if call[name][0] == call[name][1] and rng.random() < 0.5:
            call[name] = call[name][0]
        elif rng.random() < 0.2:
            call[name] = list(call[name])
    return call


def arguments(op, call):
    """Without what ``op`` does not take."""
    return {k: v for k, v in call.items() if k != "residual" or op == "conv_bn_add_relu"}


def mapped(call, function):
    """``function`` of every tensor; a tensor that is there twice stays one."""
    done = {}

    def once(t):
        if id(t) not in done:
            done[id(t)] = function(t)
        return done[id(t)]

    return {k: once(v) if isinstance(v, torch.Tensor) else v for k, v in call.items()}


def meta(call):
    return mapped(call, lambda t: t.to("meta"))


def magnitudes(call):
    """The same sums in float64 with all terms positive: what rounding errors are small against."""
    positive = mapped(call, lambda t: t.detach().double().abs())
    if positive["running_mean"] is not None:
        positive["running_mean"] = -positive["running_mean"]
        positive["running_var"] = call["running_var"].detach().double()
    return positive


def plain(op, call):
    """The operator on PyTorch's own; batch norm written out, for it has no gradients of the statistics otherwise."""
    pairs = call["stride"], call["padding"], call["dilation"]
    bias = None if call["bias"] is None else call["bias"].to(call["x"].dtype)
    y = F.conv2d(call["x"], call["weight"], bias, *pairs, call["groups"])
    if call["running_mean"] is not None:
        gamma, beta, mean, var = (None if call[n] is None else call[n][:, None, None] for n in VECTORS[1:])
        y = (y - mean) * torch.rsqrt(var + call["eps"])
        y = y if gamma is None else y * gamma
        y = (y if beta is None else y + beta).to(call["x"].dtype)
    if op == "conv_bn_add_relu":
        y = y + call["residual"]
    return y if op == "conv_bn" else F.relu(y)

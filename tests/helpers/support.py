"""What the tests share: references of higher precision, the error rule, layouts, random networks.

Nothing here calls resnet_fast's kernels: references are torch.nn.functional in float64, and NumPy's 80-bit long double
where float64 itself is under test.
"""

import copy
import itertools
import re
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from resnet_fast import backends

OPS = ("conv_bn", "conv_bn_relu", "conv_bn_add_relu")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# How far one Winograd convolution may be from float64, in errors of eager's; direct ones may be 2.
WINOGRAD_FACTOR = 3
EAGER_LAYOUTS = (torch.contiguous_format, torch.channels_last)
# For what PyTorch alone computes: a mode that watches every operation, as simulated GPUs have one, doubles its time.
unwatched = _disable_current_modes


class NoWildGradients(TorchDispatchMode):
    """Fails before PyTorch is asked for gradients whose computation may overwrite the memory of the test process.

    resnet_fast/ops/conv_gradient.py says which; here layouts do not count, for a weight of 1 x 1 is in both. Maps that
    strides do not divide go through other code of oneDNN's: that is what eager may be compared on.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution_backward.default:
            grad, x, weight, _, stride, *_, mask = args
            divided = all(g * s == n for g, s, n in zip(grad.shape[2:], stride, x.shape[2:], strict=True))
            wild = mask[1] and weight.shape[2:] == (1, 1) and max(stride) > 1 and divided and x.shape[1] < 16
            assert not wild or x.dtype == torch.float64, f"weight's gradient of 1x1, stride {stride}, x {x.shape}"
        return function(*args, **(kwargs or {}))


@contextmanager
def exact_kernels():
    """Kernels that multiply and add plainly, so that sums of small integers are exact: no Winograd transform."""
    switch = getattr(backends, "cpu", None)
    if switch is None or not hasattr(switch, "allow_winograd"):
        yield
        return
    before, switch.allow_winograd = switch.allow_winograd, False
    try:
        yield
    finally:
        switch.allow_winograd = before


def rms(values):
    values = np.asarray(values)
    return np.sqrt(np.mean(np.square(values))) if values.size else values.dtype.type(0)


def numbers(t):
    """A tensor's values in long double, which holds every value of every dtype here."""
    return t.detach().double().numpy().astype(np.longdouble)


def name_of(value):
    """Of a parameter, without addresses of functions and numbers of tensors: the same in every process."""
    return " ".join(value) if isinstance(value, dict) else re.sub(r" at 0x[0-9a-f]+", "", str(value))


def assert_error_rule(out, exact, eager, what="output", factor=2):
    """rms(out - exact) <= factor * rms(eager - exact) + one rounding, for the worst of the eager results.

    The factor is 2, and WINOGRAD_FACTOR for what one or two Winograd convolutions give.

    One rounding: eps / 2 is the largest relative error of rounding to nearest, so a result that is exact but for its
    final rounding has an rms error of at most eps / 2 * rms(exact).
    """
    exact = exact if isinstance(exact, np.ndarray) else numbers(exact)
    error = rms(numbers(out) - exact)
    worst = max(rms(numbers(e) - exact) for e in eager)
    rounding = torch.finfo(out.dtype).eps / 2 * rms(exact)
    assert error <= factor * worst + rounding, (
        f"{what}: error {error:.3g}, eager {worst:.3g}, one rounding {rounding:.3g}"
    )


def conv_longdouble(x, weight, stride, padding):
    (sh, sw), (ph, pw) = stride, padding
    x = np.pad(numbers(x) if isinstance(x, torch.Tensor) else x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(2, 3))[:, :, ::sh, ::sw]
    return np.einsum("nchwrs,kcrs->nkhw", windows, numbers(weight), optimize=True)


@dataclass
class Case:
    """One convolution layer with everything that may go with it."""

    x: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    bn: tuple  # weight, bias, running_mean, running_var, each may be None
    eps: float
    stride: tuple
    padding: tuple

    def images(self, op):
        return (self.x, self.residual) if op == "conv_bn_add_relu" else (self.x,)

    def fused(self, op, **changes):
        import resnet_fast

        kwargs = {"eps": self.eps, "stride": self.stride, "padding": self.padding, **changes}
        return getattr(resnet_fast.ops, op)(*self.images(op), self.weight, self.bias, *self.bn, **kwargs)

    def to(self, dtype):
        def cast(t):
            return None if t is None else t.to(dtype)

        return Case(
            cast(self.x),
            cast(self.residual),
            cast(self.weight),
            cast(self.bias),
            tuple(map(cast, self.bn)),
            self.eps,
            self.stride,
            self.padding,
        )

    def eager(self, op, layout=torch.contiguous_format):
        gamma, beta, mean, var = self.bn
        y = F.conv2d(
            self.x.contiguous(memory_format=layout),
            self.weight.contiguous(memory_format=layout),
            # Eager wants one dtype; the fused operator takes the bias in float32 beside bfloat16 images.
            None if self.bias is None else self.bias.to(self.x.dtype),
            self.stride,
            self.padding,
        )
        if mean is not None:
            y = F.batch_norm(y, mean, var, gamma, beta, training=False, eps=self.eps)
        if op == "conv_bn_add_relu":
            y = y + self.residual.contiguous(memory_format=layout)
        return y if op == "conv_bn" else F.relu(y)

    def exact(self, op):
        """float64 for the narrower types, long double for float64."""
        if self.x.dtype != torch.float64:
            return self.to(torch.float64).eager(op)
        y = conv_longdouble(self.x, self.weight, self.stride, self.padding)
        gamma, beta, mean, var = (None if t is None else numbers(t)[:, None, None] for t in self.bn)
        if self.bias is not None:
            y = y + numbers(self.bias)[:, None, None]
        if mean is not None:
            y = (y - mean) / np.sqrt(var + np.longdouble(self.eps))
            y = y if gamma is None else y * gamma
            y = y if beta is None else y + beta
        if op == "conv_bn_add_relu":
            y = y + numbers(self.residual)
        return y if op == "conv_bn" else np.maximum(y, 0)


def pair(value):
    return (value, value) if isinstance(value, int) else value


def out_size(size, kernel, stride, padding):
    return tuple((s + 2 * p - k) // t + 1 for s, k, t, p in zip(size, kernel, stride, padding, strict=True))


def random_case(n, c, size, k, kernel, stride=1, padding=0, dtype=torch.float32, bias=True, bn=True):
    """Normal images and weights of variance 1 / fan_in, so that activations keep their scale."""
    kernel, stride, padding = pair(kernel), pair(stride), pair(padding)
    fan_in = c * kernel[0] * kernel[1]
    vectors = torch.float32 if dtype == torch.bfloat16 else dtype
    rand = lambda: torch.rand(k, dtype=vectors)  # noqa: E731
    return Case(
        torch.randn(n, c, *size).to(dtype),
        torch.randn(n, k, *out_size(size, kernel, stride, padding)).to(dtype),
        (torch.randn(k, c, *kernel) / fan_in**0.5).to(dtype),
        torch.randn(k, dtype=vectors) if bias else None,
        (rand() + 0.5, rand() - 0.5, rand() - 0.5, rand() + 0.5) if bn else (None,) * 4,
        1e-5,
        stride,
        padding,
    )


def integer_case(n, c, size, k, kernel, stride=1, padding=0, dtype=torch.float32):
    """Integers of +-4 and scales that are powers of two: every product and sum is exact in float32 and wider."""
    kernel, stride, padding = pair(kernel), pair(stride), pair(padding)
    integers = lambda *shape: torch.randint(-4, 5, shape).to(dtype)  # noqa: E731
    power = lambda low, high: torch.ldexp(torch.ones(k), torch.randint(low, high, (k,))).to(dtype)  # noqa: E731
    eps = 0.25  # variance and eps add up to a power of four
    signs = torch.where(torch.rand(k) < 0.5, -1, 1).to(dtype)
    return Case(
        integers(n, c, *size),
        integers(n, k, *out_size(size, kernel, stride, padding)),
        integers(k, c, *kernel),
        integers(k),
        (power(-1, 2) * signs, integers(k), integers(k), power(-1, 2) ** 2 - eps),
        eps,
        stride,
        padding,
    )


def contiguous(t):
    return t.contiguous()


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


def permuted(t):
    """Strides in the order W, N, H, C: no memory format of PyTorch's."""
    return t.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)


def sliced(t):
    """A window into a larger tensor, with a storage offset and gaps in every dimension."""
    n, c, h, w = t.shape
    big = torch.full((n + 2, c + 3, h + 2, 2 * w + 1), torch.nan, dtype=t.dtype)
    view = big[1 : n + 1, 2 : c + 2, 1 : h + 1, 1 : 2 * w + 1 : 2]
    return view.copy_(t)


def sliced_channels_last(t):
    """Some channels of a channels_last tensor: channels are dense, pixels are not."""
    n, c, h, w = t.shape
    big = channels_last(torch.full((n, c + 3, h, w), torch.nan, dtype=t.dtype))
    return big[:, 1 : c + 1].copy_(t)


def channels_last_strides_only(t):
    """channels_last inside an image, but images far apart and rows padded."""
    n, c, h, w = t.shape
    big = channels_last(torch.full((2 * n, c, h + 1, w + 2), torch.nan, dtype=t.dtype))
    return big[::2, :, :h, 2:].copy_(t)


LAYOUTS = (contiguous, channels_last, permuted, sliced, sliced_channels_last, channels_last_strides_only)


def randomize_(model, seed=0):
    """Batch norms as after training: affine parameters and statistics that are not 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.copy_(torch.randn(m.num_features, generator=generator) * 0.2)
                m.running_var.copy_(torch.rand(m.num_features, generator=generator) + 0.5)
                m.weight.copy_(torch.rand(m.num_features, generator=generator) * 0.5 + 0.5)
                m.bias.copy_(torch.randn(m.num_features, generator=generator) * 0.2)
    return model


def computing(device):
    """The launches of a simulated device, without those that compare weights (``backends.cuda.check_weights``)."""
    return [(name, report) for name, report in device.launches if name != "_refresh_filters_kernel"]


# The families with one block a stage: what is not about depth needs no more.
SHALLOW = ("CifarResNet", "ResNet of basic blocks", "ResNet of bottlenecks", "ResNet32")


def shallow(home, name):
    """``name`` of ``SHALLOW``, of the module ``home`` (``models``, ``reference``); ResNet32 has one depth only."""
    return {
        "CifarResNet": lambda: home.CifarResNet(1),
        "ResNet of basic blocks": lambda: home.ResNet([1] * 4),
        "ResNet of bottlenecks": lambda: home._BottleneckResNet([1] * 4),
        "ResNet32": lambda: home.ResNet32(image_size=64),
    }[name]()


@unwatched()
def twins(fast_class, eager_class, *args, seed=0, **kwargs):
    """The fast model and its eager twin with the same random weights, in eval mode."""
    fast = randomize_(fast_class(*args, **kwargs), seed)
    eager = eager_class(*args, **kwargs)
    eager.load_state_dict(fast.state_dict(), strict=True)
    return fast.eval(), eager.eval()


@unwatched()
def eager_results(eager, x, method="__call__"):
    """The eager model's results in its two layouts, and in float64."""
    with torch.no_grad():
        results = [
            getattr(copy.deepcopy(eager).to(memory_format=layout), method)(x.contiguous(memory_format=layout))
            for layout in EAGER_LAYOUTS
        ]
        return getattr(copy.deepcopy(eager).double(), method)(x.double()), results


def assert_same_model(fast, eager, x, method="__call__", factor=3):
    """The fast model's result by the error rule; returned for further questions."""
    exact, results = eager_results(eager, x, method)
    with torch.no_grad():
        out = getattr(fast, method)(x)
    assert out.dtype == results[0].dtype
    assert_error_rule(out, exact, results, factor=factor)
    return out


def product(*lists):
    return list(itertools.product(*lists))

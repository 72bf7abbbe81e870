"""pack_conv_bn and conv_chain: chains of convolutions, direct and by Winograd."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.support import (
    DTYPES,
    EAGER_LAYOUTS,
    LAYOUTS,
    WINOGRAD_FACTOR,
    assert_error_rule,
    channels_last,
    conv_longdouble,
    numbers,
    pair,
    random_case,
    rms,
)

DIRECT, WINOGRAD, COMPACT_WINOGRAD = 0, 1, 2  # `algorithm` of pack_conv_bn
ALGORITHMS = (DIRECT, WINOGRAD, COMPACT_WINOGRAD)
stage = torch.ops.resnet_fast.conv_chain
pack = torch.ops.resnet_fast.pack_conv_bn


@dataclass
class Layer:
    """A convolution of `out` channels that reads value `source` and adds value `residual`; value 0 is the input."""

    out: int
    kernel: int | tuple = 3
    stride: int | tuple = 1
    padding: int | tuple = 1
    source: int = -1  # the value before
    residual: int = -1  # none
    relu: bool = True
    params: list = field(default_factory=list)


@dataclass
class Chain:
    layers: list
    channels: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        channels = [self.channels]
        for i, layer in enumerate(self.layers):
            layer.source = i if layer.source < 0 else layer.source
            case = random_case(1, channels[layer.source], (64, 64), layer.out, layer.kernel, dtype=self.dtype)
            layer.params = [case.weight, case.bias, *case.bn, 1e-5]
            channels.append(layer.out)

    def integers_(self):
        """Weights of -1, 0 and 1, no batch norm: with inputs of +-2, sums through three layers stay below 2^24."""
        for layer in self.layers:
            weight = torch.randint_like(layer.params[0], -1, 2)
            layer.params = [weight, torch.randint(-2, 3, (layer.out,)).to(self.dtype), *[None] * 4, 0.0]
        return self

    def fused(self, x, algorithm=DIRECT):
        filters, numbers = [], []
        for layer in self.layers:
            winograd = algorithm if (pair(layer.kernel), pair(layer.stride)) == ((3, 3), (1, 1)) else DIRECT
            filters.append(pack(*layer.params, winograd))
            numbers += [layer.source, layer.residual, int(layer.relu), layer.out]
            numbers += [*pair(layer.kernel), *pair(layer.stride), *pair(layer.padding)]
        return stage(x, filters, numbers)

    def exact(self, x):
        """float64 for the narrower types, long double for float64."""
        if x.dtype != torch.float64:
            return self.eager(x, dtype=torch.float64)
        values = [numbers(x)]
        for layer in self.layers:
            weight, bias, *bn, eps = layer.params
            bias, gamma, beta, mean, var = (numbers(t)[:, None, None] for t in (bias, *bn))
            y = conv_longdouble(values[layer.source], weight, pair(layer.stride), pair(layer.padding)) + bias
            y = (y - mean) / np.sqrt(var + np.longdouble(eps)) * gamma + beta
            if layer.residual >= 0:
                y = y + values[layer.residual]
            values.append(np.maximum(y, 0) if layer.relu else y)
        return values[-1]

    def eager(self, x, layout=torch.contiguous_format, dtype=None):
        """bfloat16 as PyTorch has it: every operator rounds its result."""
        dtype = dtype or x.dtype
        values = [x.to(dtype).contiguous(memory_format=layout)]
        for layer in self.layers:
            weight, bias, gamma, beta, mean, var, eps = layer.params
            cast = [
                None if t is None else t.double() if dtype == torch.float64 else t for t in (gamma, beta, mean, var)
            ]
            y = F.conv2d(
                values[layer.source], weight.to(dtype), bias.to(dtype), pair(layer.stride), pair(layer.padding)
            )
            if mean is not None:
                y = F.batch_norm(y, cast[2], cast[3], cast[0], cast[1], training=False, eps=eps)
            if layer.residual >= 0:
                y = y + values[layer.residual]
            values.append(F.relu(y) if layer.relu else y)
        return values[-1]


def chains(channels, k):
    """Each chain by a name, so that a failure says what it is about."""
    return {
        "single": [Layer(k)],
        "no relu": [Layer(k, relu=False), Layer(k)],
        "identity block": [Layer(k), Layer(channels, residual=0)],
        "projection block": [
            Layer(k, stride=2),
            Layer(k, 1, 2, 0, source=0, relu=False),
            Layer(k, source=1, residual=2),
        ],
        "two blocks": [Layer(k), Layer(channels, residual=0), Layer(k), Layer(channels, residual=2)],
        "bottleneck": [Layer(k, 1, 1, 0), Layer(k), Layer(channels, 1, 1, 0, residual=0)],
        # One value read with different padding: its halo must serve both.
        "paddings": [Layer(k), Layer(k, 5, 1, 2, source=1), Layer(k, 3, 1, 1, source=1, residual=2)],
        "padding 0 and 2": [Layer(k, padding=2), Layer(k, padding=0), Layer(k, padding=3)],
        "unused value": [Layer(k), Layer(3, source=0), Layer(k, source=1)],
        "long skip": [Layer(k), Layer(k), Layer(k), Layer(k, residual=1), Layer(channels, residual=0)],
        "residual is the source": [Layer(k), Layer(k, residual=1)],
    }


NAMES = list(chains(3, 3))


@pytest.mark.parametrize(
    ("channels", "k", "batch", "size"),
    [
        (16, 16, 2, (8, 8)),
        (17, 16, 1, (7, 9)),
        (16, 3, 5, (5, 5)),
        (1, 65, 3, (9, 6)),
        (64, 17, 2, (4, 13)),
        (3, 1, 1, (3, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_chains_of_small_integers_are_exact(name, channels, k, batch, size):
    for dtype in (torch.float32, torch.float64):
        chain = Chain(chains(channels, k)[name], channels, dtype).integers_()
        x = torch.randint(-2, 3, (batch, channels, *size)).to(dtype)
        exact = chain.eager(x, dtype=torch.float64)
        if exact.abs().max() >= 2**24:
            # The chain of four layers at 64 channels: beyond what float32 holds, shown by the error rule below.
            continue
        assert torch.equal(chain.fused(x).double(), exact)


@pytest.mark.parametrize(("channels", "k", "batch", "size"), [(16, 32, 3, (9, 7)), (17, 64, 2, (6, 10))], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_error_rule(name, dtype, channels, k, batch, size):
    chain = Chain(chains(channels, k)[name], channels, dtype)
    x = torch.randn(batch, channels, *size).to(dtype)
    out = chain.fused(x)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    eager = [chain.eager(x, layout) for layout in EAGER_LAYOUTS]
    assert_error_rule(out, chain.exact(x), eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("channels", "k", "batch", "size"), [(16, 32, 3, (9, 7)), (65, 17, 1, (4, 10))], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_winograd_chains(name, channels, k, batch, size, dtype):
    """A chain of up to five: the errors of Winograd convolutions add up as eager's do."""
    chain = Chain(chains(channels, k)[name], channels, dtype)
    x = torch.randn(batch, channels, *size).to(dtype)
    eager = [chain.eager(x, layout) for layout in EAGER_LAYOUTS]
    assert_error_rule(chain.fused(x, WINOGRAD), chain.eager(x, dtype=torch.float64), eager, factor=WINOGRAD_FACTOR)


@pytest.mark.parametrize("padding", [0, 1, 2, (3, 0)], ids=str)
@pytest.mark.parametrize("size", [(3, 3), (4, 4), (5, 8), (7, 7), (14, 11), (1, 40)], ids=str)
@pytest.mark.parametrize(("channels", "k"), [(1, 1), (3, 17), (16, 16), (17, 64), (65, 3), (64, 72)])
def test_winograd_convolution(channels, k, size, padding):
    """One convolution: within a factor of eager's rms error and 1e-6 of the result."""
    rows, columns = pair(padding)
    if size[0] + 2 * rows < 3 or size[1] + 2 * columns < 3:
        size = (3, 3)
    chain = Chain([Layer(k, padding=padding, relu=False)], channels)
    x = torch.randn(3, channels, *size)
    out, exact = chain.fused(x, WINOGRAD), chain.eager(x, dtype=torch.float64)
    assert rms(numbers(out) - numbers(exact)) <= 1e-6 * rms(numbers(exact))
    # Sums of fewer channels are almost exact in eager, but the transforms' own roundings stay.
    if channels >= 16:
        assert_error_rule(out, exact, [chain.eager(x, layout) for layout in EAGER_LAYOUTS], factor=WINOGRAD_FACTOR)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["single", "identity block", "bottleneck"])
def test_layouts_of_the_input(name, layout, algorithm):
    chain = Chain(chains(16, 32)[name], 16)
    x = torch.randn(3, 16, 9, 7)
    eager = [chain.eager(x, layout) for layout in EAGER_LAYOUTS]
    assert_error_rule(
        chain.fused(layout(x), algorithm),
        chain.eager(x, dtype=torch.float64),
        eager,
        factor=WINOGRAD_FACTOR if algorithm else 2,
    )


@pytest.mark.parametrize("name", NAMES)
def test_empty_batch(name):
    chain = Chain(chains(16, 32)[name], 16)
    x = torch.randn(0, 16, 9, 7)
    for algorithm in ALGORITHMS:
        assert chain.fused(x, algorithm).shape == chain.eager(x).shape


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_image_does_not_depend_on_its_batch(batch, algorithm):
    """Carried in groups or split over threads: the sums of an image are the same, bit for bit."""
    chain = Chain(chains(16, 32)["projection block"], 16)
    x = torch.randn(batch, 16, 11, 11)
    whole = chain.fused(x, algorithm)
    eager = [chain.eager(x, layout) for layout in EAGER_LAYOUTS]
    assert_error_rule(whole, chain.eager(x, dtype=torch.float64), eager, factor=WINOGRAD_FACTOR if algorithm else 2)
    for i in range(batch):
        assert torch.equal(whole[i : i + 1], chain.fused(x[i : i + 1], algorithm))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nan_and_infinity_are_not_lost(value, algorithm):
    """Winograd may spread them over a algorithm, but what eager makes NaN never comes out as a number."""
    chain = Chain(chains(17, 16)["identity block"], 17)
    x = torch.randn(2, 17, 9, 9)
    x[1, 3, 4, 4] = value
    out, eager = chain.fused(x, algorithm), chain.eager(x)
    lost = out[~eager.isfinite()].isfinite()
    assert not lost.any()
    assert out[0].isfinite().all()
    if algorithm == DIRECT:
        assert torch.equal(out.isfinite(), eager.isfinite())


def test_packed_filters_of_another_shape():
    weight = torch.randn(8, 4, 3, 3)
    with pytest.raises(RuntimeError, match=r"filters\[0\]"):
        stage(torch.randn(1, 5, 6, 6), [pack(weight, *[None] * 5, 0.0)], [0, -1, 1, 8, 3, 3, 1, 1, 1, 1])
    with pytest.raises(RuntimeError, match=r"filters\[0\]"):
        stage(torch.randn(1, 4, 6, 6).double(), [pack(weight, *[None] * 5, 0.0)], [0, -1, 1, 8, 3, 3, 1, 1, 1, 1])
    packed = pack(weight, *[None] * 5, 0.0)
    with pytest.raises(RuntimeError, match=r"filters\[0\]"):
        stage(torch.randn(1, 4, 6, 6), [packed.repeat_interleave(2)[::2]], [0, -1, 1, 8, 3, 3, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("name", "x", "layers"),
    [
        ("layers", (1, 4, 6, 6), [0, -1, 1, 8, 3, 3, 1, 1, 1]),
        ("layer 0", (1, 4, 6, 6), [1, -1, 1, 8, 3, 3, 1, 1, 1, 1]),
        ("layer 0", (1, 4, 6, 6), [-1, -1, 1, 8, 3, 3, 1, 1, 1, 1]),
        ("layer 0", (1, 4, 6, 6), [0, 1, 1, 8, 3, 3, 1, 1, 1, 1]),
        ("layer 0", (1, 4, 6, 6), [0, -2, 1, 8, 3, 3, 1, 1, 1, 1]),
        ("layer 0", (1, 4, 6, 6), [0, -1, 1, 0, 3, 3, 1, 1, 1, 1]),
        ("layer 0", (1, 4, 6, 6), [0, -1, 1, 8, -3, 3, 1, 1, 1, 1]),
        ("filters", (1, 4, 6, 6), [0, -1, 1, 17, 3, 3, 1, 1, 1, 1]),
        ("stride", (1, 4, 6, 6), [0, -1, 1, 8, 3, 3, 0, 1, 1, 1]),
        ("padding", (1, 4, 6, 6), [0, -1, 1, 8, 3, 3, 1, 1, 1, -1]),
        ("residual", (1, 4, 6, 6), [0, 0, 1, 8, 3, 3, 1, 1, 1, 1]),
        ("x", (4, 6, 6), [0, -1, 1, 8, 3, 3, 1, 1, 1, 1]),
        ("x", (1, 4, 1, 6), [0, -1, 1, 8, 3, 3, 1, 1, 0, 0]),
        ("x", (1, 0, 6, 6), [0, -1, 1, 8, 3, 3, 1, 1, 1, 1]),
        ("filters", (1, 4, 6, 6), [0, -1, 1, 8, 3, 3, 1, 1, 1, 1] * 2),
    ],
)
def test_errors_name_the_argument(name, x, layers):
    packed = pack(torch.randn(8, 4, 3, 3), *[None] * 5, 0.0)
    with pytest.raises(RuntimeError, match=rf"\b{name}\b"):
        stage(torch.randn(x), [packed], layers)
    with pytest.raises(RuntimeError, match=r"\bx\b"):
        stage(torch.ones(1, 4, 6, 6, dtype=torch.int32), [packed], [0, -1, 1, 8, 3, 3, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("weight", [torch.randn(8, 4, 3), *[None] * 5, 0.0]),
        ("weight", [torch.randn(8, 4, 3, 3).half(), *[None] * 5, 0.0]),
        ("bias", [torch.randn(8, 4, 3, 3), torch.randn(9), *[None] * 4, 0.0]),
        ("running_var", [torch.randn(8, 4, 3, 3), None, None, None, torch.randn(8), torch.randn(3), 0.0]),
        ("algorithm", [torch.randn(8, 4, 3, 3), *[None] * 5, 0.0, 5]),
        ("algorithm", [torch.randn(8, 4, 5, 3), *[None] * 5, 0.0, WINOGRAD]),
    ],
)
def test_errors_of_packing_name_the_argument(name, args):
    with pytest.raises(RuntimeError, match=rf"\b{name}\b"):
        pack(*args)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_a_filter_of_36_taps_is_not_taken_for_winograd(stride):
    """As many elements as a transformed 3x3 filter has."""
    chain = Chain([Layer(16, 6, stride, 2)], 16)
    x = channels_last(torch.randn(2, 16, 12, 12))
    eager = [chain.eager(x, layout) for layout in EAGER_LAYOUTS]
    assert_error_rule(chain.fused(x), chain.eager(x, dtype=torch.float64), eager)


def test_the_operators_have_no_gradient_and_say_so():
    weight = torch.randn(8, 4, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="pack_conv_bn has no gradient of its own"):
        pack(weight, *[None] * 5, 0.0).sum().backward()
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="conv_chain has no gradient of its own"):
        stage(x, [pack(weight.detach(), *[None] * 5, 0.0)], [0, -1, 1, 8, 3, 3, 1, 1, 1, 1]).sum().backward()

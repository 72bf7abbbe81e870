"""Convolutions by products of bfloat16, direct and by Winograd's F(2x2)."""

import pytest
import torch
import torch.nn.functional as F
from helpers.support import EAGER_LAYOUTS, LAYOUTS, assert_error_rule, channels_last, out_size, pair, twins

import resnet_fast
from resnet_fast import backends, reference
from resnet_fast.chain import cpu_algorithm as choose
from resnet_fast.ops.spec import decode

DIRECT, WINOGRAD = choose.BF16_DIRECT, choose.BF16_WINOGRAD
pack = torch.ops.resnet_fast.pack_conv_bn
stage = torch.ops.resnet_fast.conv_chain

# batch, channels, size, out_channels, kernel, stride, padding: blocks of channels and panels with and without a rest,
# odd channels, tiles that are cut off, more tiles than a call takes, one pixel.
SHAPES = [
    (2, 16, (8, 8), 16, 3, 1, 1),
    (1, 3, (30, 31), 64, 7, 2, 3),
    (2, 5, (9, 11), 7, 3, 1, 1),
    (3, 64, (14, 14), 64, 3, 1, 1),
    (1, 40, (33, 31), 33, 3, 1, 1),
    (2, 49, (13, 6), 80, 3, 1, 0),
    (2, 64, (10, 10), 128, 3, 2, 1),
    (2, 33, (9, 9), 70, 1, 1, 0),
    (1, 320, (5, 5), 96, 3, 2, 1),
    (1, 512, (7, 7), 48, 3, 1, 1),
    (1, 1, (1, 1), 1, 1, 1, 0),
    (1, 2, (5, 4), 3, 3, 1, 2),
]


def algorithms(kernel, stride):
    return (DIRECT, WINOGRAD) if (kernel, stride) == (3, 1) else (DIRECT,)


CASES = [(shape, a) for shape in SHAPES for a in algorithms(shape[4], shape[5])]


class Problem:
    """relu(conv(x) + bias + x'), x' a convolution of x by 1x1 with the same stride: a block with a projection."""

    def __init__(self, shape, numbers):
        n, c, size, k, kernel, stride, padding = shape
        self.stride, self.padding = stride, padding
        self.x = numbers(n, c, *size).bfloat16()
        self.weight, self.bias = numbers(k, c, kernel, kernel), numbers(k)
        self.projection = numbers(k, c, 1, 1)
        # The projection's padding makes its result as large as that of the filter.
        self.side = padding - kernel // 2
        self.sizes = out_size(size, (kernel, kernel), pair(stride), pair(padding))

    def eager(self, dtype, layout=torch.contiguous_format):
        x, weight, bias = (t.to(dtype) for t in (self.x, self.weight, self.bias))
        x = x.contiguous(memory_format=layout)
        y = F.conv2d(x, weight.contiguous(memory_format=layout), bias, self.stride, self.padding)
        if self.side >= 0:
            y = y + F.conv2d(x, self.projection.to(dtype), None, self.stride, self.side)
        return F.relu(y)

    def fused(self, algorithm, x=None):
        k, _, kernel, _ = self.weight.shape
        filters = [pack(self.weight, self.bias, *[None] * 4, 0.0, algorithm)]
        layers = [0, -1, 1, k, kernel, kernel, *pair(self.stride), *pair(self.padding)]
        if self.side >= 0:
            filters.insert(0, pack(self.projection, *[None] * 5, 0.0, DIRECT))
            projection = [0, -1, 0, k, 1, 1, *pair(self.stride), *pair(self.side)]
            layers = [*projection, 0, 1, *layers[2:]]
        return stage(self.x if x is None else x, filters, layers)


def integers(*shape):
    return torch.randint(-1, 2, shape).float()


def normal(*shape):
    scale = torch.tensor(shape[1:]).prod() ** 0.5 if len(shape) == 4 and shape[2] == shape[3] else 1
    return torch.randn(shape) / scale


@pytest.mark.parametrize(("shape", "algorithm"), CASES)
def test_exact_on_small_integers(shape, algorithm):
    """Sums are exact in float32 and so are the transforms: all that is rounded is the result, once."""
    problem = Problem(shape, integers)
    exact = problem.eager(torch.float64)
    if problem.side >= 0:  # the projection is a map of its own, rounded as maps are: small enough for that to be exact
        assert F.conv2d(problem.x.float(), problem.projection).abs().max() <= 256
    assert torch.equal(problem.fused(algorithm), exact.bfloat16())


@pytest.mark.parametrize(("shape", "algorithm"), CASES)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_error_rule(shape, algorithm, weights):
    problem = Problem(shape, lambda *size: normal(*size).to(weights).float())
    out = problem.fused(algorithm)
    assert out.is_contiguous(memory_format=torch.channels_last)
    eager = [problem.eager(torch.bfloat16, layout) for layout in EAGER_LAYOUTS]
    assert_error_rule(out, problem.eager(torch.float64), eager)


@pytest.mark.parametrize("algorithm", [DIRECT, WINOGRAD])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_bits(layout, algorithm):
    problem = Problem((2, 24, (9, 7), 40, 3, 1, 1), normal)
    assert torch.equal(problem.fused(algorithm, layout(problem.x)), problem.fused(algorithm))


def test_special_values_stay_in_their_windows():
    """An odd number of channels: what fills up the last pair must not reach into the sums."""
    problem = Problem((1, 7, (12, 12), 20, 3, 1, 1), normal)
    problem.x[0, 6, 5, 5] = torch.nan
    problem.x[0, 2, 0, 0] = torch.inf
    out, exact = problem.fused(DIRECT), problem.eager(torch.float64)
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.isinf(), exact.isinf())


@pytest.mark.parametrize("algorithm", [DIRECT, WINOGRAD])
def test_the_number_of_threads_does_not_matter(algorithm):
    problem = Problem((5, 96, (15, 13), 160, 3, 1, 1), normal)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results += [problem.fused(algorithm) for _ in range(2)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


def test_errors_name_the_argument():
    packed = pack(torch.randn(8, 4, 3, 3), *[None] * 5, 0.0, DIRECT)
    plain = pack(torch.randn(8, 8, 3, 3), *[None] * 5, 0.0)
    layers, x = [0, -1, 1, 8, 3, 3, 1, 1, 1, 1], torch.randn(1, 4, 6, 6)
    with pytest.raises(RuntimeError, match="x has dtype float32, want bfloat16"):
        stage(x, [packed], layers)
    with pytest.raises(RuntimeError, match=r"filters\[1\] is not what pack_conv_bn gives in bfloat16"):
        stage(x.bfloat16(), [packed, plain], [*layers, 1, *layers[1:]])
    with pytest.raises(RuntimeError, match=r"filters\[0\] is not what pack_conv_bn gives for"):
        stage(x.bfloat16(), [plain, packed], [0, -1, 1, 8, 3, 3, 1, 1, 1, 1, 1, *layers[1:]])
    with pytest.raises(RuntimeError, match="computes in bfloat16, weight has dtype float64"):
        pack(torch.randn(8, 4, 3, 3).double(), *[None] * 5, 0.0, DIRECT)
    with pytest.raises(RuntimeError, match="algorithm is 4, want 0 or 3"):
        pack(torch.randn(8, 4, 1, 1), *[None] * 5, 0.0, WINOGRAD)


@pytest.fixture
def switches():
    before = backends.cpu.allow_winograd, backends.cpu.allow_bf16_products
    yield backends.cpu
    backends.cpu.allow_winograd, backends.cpu.allow_bf16_products = before


def test_networks_follow_the_switches(switches):
    """By products of bfloat16 where there are instructions for them, else in float32; both by the error rule."""
    fast, eager = twins(resnet_fast.cifar_resnet20, reference.cifar_resnet20)
    x = channels_last(torch.randn(8, 3, 32, 32))
    results, used = {}, {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        eagers = [
            eager.to(memory_format=layout).features(x.contiguous(memory_format=layout)) for layout in EAGER_LAYOUTS
        ]
        for allowed in (True, False):
            switches.allow_bf16_products = allowed
            results[allowed] = fast.features(x)
            used[allowed] = set(fast.layer1._chain.algorithms(x.bfloat16()))
    with torch.no_grad():
        exact = eager.double().features(x.double())
    for allowed, out in results.items():
        assert_error_rule(out, exact, eagers, f"allow_bf16_products = {allowed}")
    assert used[False] <= {choose.DIRECT, choose.WINOGRAD, choose.COMPACT_WINOGRAD}
    native = torch.ops.resnet_fast.cpu_multiplies_bf16()
    assert bool(used[True] & {DIRECT, WINOGRAD}) == native
    assert torch.equal(results[True], results[False]) != native


def test_the_choice(switches, monkeypatch):
    monkeypatch.setattr(backends, "_bf16_products", True)
    layer = [0, -1, 1, 64, 3, 3, 1, 1, 1, 1]
    strided = [0, -1, 1, 64, 3, 3, 2, 2, 1, 1]
    shape = torch.Size([8, 64, 56, 56])

    def chosen(layers, dtype=torch.bfloat16):
        return choose.algorithms(decode(layers), shape, dtype)[0]

    assert (chosen(layer), chosen(strided)) == (WINOGRAD, DIRECT)
    assert chosen(layer, torch.float32) == choose.WINOGRAD
    # A filter that is read for a single tile costs more than its products.
    small = decode([0, -1, 1, 512, 3, 3, 1, 1, 1, 1])
    assert choose.algorithms(small, torch.Size([1, 512, 2, 2]), torch.bfloat16) == [DIRECT]
    switches.allow_winograd = False
    assert chosen(layer) == DIRECT
    switches.allow_bf16_products = False
    assert chosen(layer) == choose.DIRECT


@torch.no_grad()
def test_explain_names_the_kernels():
    model = resnet_fast.cifar_resnet20().eval()
    with torch.autocast("cpu", torch.bfloat16):
        rows = resnet_fast.explain(model, torch.randn(2, 3, 32, 32), runs=1).rows
    kernels = [row.kernel for row in rows if "eager" not in row.kernel]
    named = [kernel.startswith("bf16 ") and kernel.endswith("avx512_bf16") for kernel in kernels]
    assert named == [torch.ops.resnet_fast.cpu_multiplies_bf16()] * 21  # 18 in blocks, 2 projections, the stem

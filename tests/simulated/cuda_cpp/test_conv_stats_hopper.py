"""The 3x3 convolution of training on Hopper, with the batch norm before it and the statistics of the one behind it."""

import pytest
import torch
from helpers import hopper_training_support as hopper
from ptxsim import Kernel
from ptxsim.compilers import compile_cuda
from ptxsim.tests.test_faults import survivors

# Batch, height, width, channels in and out: several images in a tile, the last tile with fewer; several tiles an image,
# of heights that few lines divide; slices of 64, 32 and 16 channels, one to three of them; filters that fill no 64.
SHAPES = [
    (3, 7, 7, 64, 72),
    (5, 2, 3, 48, 64),
    (1, 6, 28, 128, 64),
    (2, 13, 11, 32, 40),
    (1, 9, 14, 192, 16),
    (1, 4, 54, 64, 136),
]


def case(n, h, w, c, k, dtype, seed=0):
    """Small integers, halves among the scales: sums and results are exact in any order."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high, *shape: torch.randint(low, high + 1, shape, generator=g)  # noqa: E731
    x, scale_shift = draw(-2, 2, n, h, w, c).to(dtype), draw(-2, 2, 2, c).float()
    weight = (draw(-1, 1, k, 3, 3, c) * (torch.rand(k, 3, 3, c, generator=g) < 0.1)).to(dtype)
    return x, weight, scale_shift, draw(-5, 5, k).float()


def reference(x, weight, scale_shift, relu, bias, stride):
    a = x.double() if scale_shift is None else x.double() * scale_shift[0] + scale_shift[1]
    a = (a.relu() if relu else a).to(x.dtype).double()
    y = torch.conv2d(a.permute(0, 3, 1, 2), weight.double().permute(0, 3, 1, 2), stride=stride, padding=1)
    return (y.permute(0, 2, 3, 1) + (0 if bias is None else bias)).to(x.dtype)


def assert_statistics(parts, y, pixels):
    """Each part is of so many pixels of y in turn, the last of what is left."""
    rows = y.flatten(0, 2).double().split(pixels)
    assert len(rows) == len(parts)
    for (mean, m2), part in zip(parts.double(), rows, strict=True):
        var, exact = torch.var_mean(part, 0, correction=0)
        assert torch.allclose(mean, exact, rtol=2e-6, atol=1e-5)
        assert torch.allclose(m2, var * len(part), rtol=1e-5, atol=1e-4)


def check(tile, shape, dtype=torch.float16, relu=True, stride=1, seed=0, normalized=True, biased=True):
    x, weight, scale_shift, bias = case(*shape, dtype, seed)
    scale_shift, bias = scale_shift if normalized else None, bias if biased else None
    y, parts, report = hopper.stats(tile, x, weight, scale_shift, relu, bias, stride, seed=seed)
    assert torch.equal(y, reference(x, weight, scale_shift, relu, bias, stride))
    assert_statistics(parts, y, hopper.plan(tile, *shape, relu, stride).pixels)
    return report


@pytest.mark.parametrize("tile", range(len(hopper.tiles())))
def test_every_tile(tile):
    """Padding is of the normalised image: a shift does not reach it."""
    for seed, shape in enumerate(SHAPES[tile % 3 :: 3] if hopper.tiles()[tile][1] == 1 else SHAPES[2::3]):
        report = check(tile, shape, seed=seed)
        assert report.conflicts() == [], shape


@pytest.mark.parametrize("shape", [(2, 7, 5, 64, 64), (1, 9, 31, 32, 72), (1, 7, 7, 192, 8)], ids=str)
def test_stride_2(shape):
    for tile, (positions, warpgroups, _) in enumerate(hopper.tiles()):
        if warpgroups > 1 or positions > 120:
            assert hopper.plan(tile, *shape, stride=2) is None
        elif shape[3] < 192 or tile == 3:
            check(tile, shape, stride=2, seed=tile)


@pytest.mark.parametrize(
    "form",
    [
        {"dtype": torch.bfloat16, "relu": False},
        {"normalized": False, "biased": False},
        {"normalized": False, "relu": False},
    ],
    ids=str,
)
def test_forms(form):
    """Without what a layer does not have: batch norm or ReLU before it, a bias."""
    check(3, (3, 7, 7, 64, 72), **form)


def test_rounding_and_large_means():
    """The activation is rounded once; statistics are of the rounded results, around a mean far from zero."""
    g = torch.Generator().manual_seed(1)
    x, weight = torch.randn(2, 8, 8, 64, generator=g).half(), (torch.randn(64, 3, 3, 64, generator=g) / 24).half()
    scale_shift, bias = torch.rand(2, 64, generator=g) + 0.5, torch.full((64,), 1000.0)
    y, parts, _ = hopper.stats(3, x, weight, scale_shift, True, bias)
    a = torch.addcmul(scale_shift[1].double(), x.double(), scale_shift[0].double()).float()  # one rounding, as of fma
    a, filters = a.relu().half().double().permute(0, 3, 1, 2), weight.double().permute(0, 3, 1, 2)
    exact = torch.conv2d(a, filters, padding=1).permute(0, 2, 3, 1) + 1000
    magnitudes = torch.conv2d(a.abs(), filters.abs(), padding=1).permute(0, 2, 3, 1)
    # 577 additions in float32, and half a unit in the last place of the result.
    assert ((y.double() - exact).abs() <= 577 * 2.0**-24 * (magnitudes + 1000) + 2.0**-11 * exact).all()
    for (mean, m2), part in zip(parts.double(), y.flatten(0, 2).double().split(64), strict=True):
        assert torch.allclose(mean, part.mean(0), rtol=2**-22, atol=0)
        assert torch.allclose(m2, part.var(0, correction=0) * 64, rtol=1e-4)


def test_not_finite():
    """ReLU keeps NaN; zeros beside the image stay zeros."""
    x, weight, scale_shift, _ = case(1, 7, 7, 64, 64, torch.float16)
    weight[:] = 1
    x[0, 3, 3, 5] = float("nan")
    y, parts, _ = hopper.stats(3, x, weight, scale_shift, True)
    near = torch.zeros(7, 7, dtype=torch.bool)
    near[2:5, 2:5] = True
    assert torch.equal(y.isnan(), near[None, :, :, None].expand_as(y))
    assert parts.isnan().all()


def test_every_statement_that_orders_is_needed():
    """Three slices of the halo, then the tile in their place: without a wait, barrier or fence there is a fault or a
    wrong result."""
    x, weight, scale_shift, bias = case(1, 3, 7, 192, 8, torch.float16)
    expected = hopper.stats(3, x, weight, scale_shift, True, bias)[:2]
    name = hopper.compiled(torch.float16, 3, 64).name
    ptx = compile_cuda(hopper.source(torch.float16, 3, 64), *hopper.FLAGS)

    def run(kernel):
        found = hopper.stats(3, x, weight, scale_shift, True, bias, kernel=kernel)[:2]
        return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    assert run(Kernel(ptx, name))
    pattern = r"^\s*(wgmma\.(wait_group|fence|commit_group)|fence\.|bar\.|cp\.async\.(wait|commit)_group).*$"
    assert survivors(ptx, pattern, name, run) == []


def test_plans():
    """Tiles hold as many pixels each, lines that divide an image, or whole images; what cannot be is refused."""
    layers = [(128, 32, 16), (128, 16, 32), (128, 8, 64), (128, 56, 64), (128, 28, 128), (128, 14, 256), (128, 7, 512)]
    for tile, (positions, warpgroups, _) in enumerate(hopper.tiles()):
        for gradient in (False, True):
            for n, h, w, c, k in [*SHAPES, *((n, size, size, c, c) for n, size, c in layers)]:
                p = hopper.plan(tile, n, h, w, c, k, gradient=gradient)
                if p is None:
                    assert w + 1 > positions or (warpgroups > 1 and (c % 64 != 0 or gradient or positions > 200))
                    continue
                a = p.args
                assert a.lines * a.pitch <= positions
                assert (p.parts - 1) * p.pixels < n * h * w <= p.parts * p.pixels
                assert p.pixels % (h * w) == 0 or h % a.lines == 0
                assert p.shared <= 227 * 1024
    assert hopper.plan(3, 1, 7, 7, 64, 64, stride=2, gradient=True) is None
    assert all(hopper.plan(3, 1, 7, 7, c, k) is None for c, k in ((8, 64), (40, 64), (64, 20)))

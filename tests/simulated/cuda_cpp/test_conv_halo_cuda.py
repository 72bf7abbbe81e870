"""The 3x3 convolution of Hopper, compiled for sm_90a and executed in the simulator."""

import pytest
import torch
from helpers import hopper_support as hopper
from ptxsim import Kernel
from ptxsim.compilers import compile_cuda
from ptxsim.tests.test_faults import survivors


def case(n, h, w, c, k, dtype, seed=0, stride=1):
    """Small integers: sums and results are exact in 16 bits, so any order of addition gives the same bits."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high, *shape: torch.randint(low, high + 1, shape, generator=g)  # noqa: E731
    x, residual = draw(-2, 2, n, h, w, c).to(dtype), draw(-9, 9, n, -(-h // stride), -(-w // stride), k).to(dtype)
    weight = (draw(-1, 1, k, 3, 3, c) * (torch.rand(k, 3, 3, c, generator=g) < 0.2)).to(dtype)
    return x, weight, draw(1, 2, k).float(), draw(-5, 5, k).float(), residual


def reference(x, weight, scale, shift, residual, relu, stride=1):
    y = torch.conv2d(x.permute(0, 3, 1, 2).double(), weight.permute(0, 3, 1, 2).double(), stride=stride, padding=1)
    y = y.permute(0, 2, 3, 1) * scale + shift + (0 if residual is None else residual.double())
    return (torch.relu(y) if relu else y).to(x.dtype)


def check(tile, shape, dtype=torch.float16, with_residual=True, relu=True, splits=1, seed=0, stride=1):
    x, weight, scale, shift, residual = case(*shape, dtype, seed, stride)
    residual = residual if with_residual else None
    y, report = hopper.run(tile, x, weight, scale, shift, residual, relu, splits, stride, seed)
    assert torch.equal(y, reference(x, weight, scale, shift, residual, relu, stride))
    return report


@pytest.mark.parametrize("tile", range(len(hopper.tiles())))
def test_first(tile):
    check(tile, (1, 7, 7, 64, 64))


# Batch, height, width, channels in and out: images in one tile, several of one image, several images in one; heights
# that tiles do not divide; slices of 64, 32 and 16 channels, one to three of them; filters that fill no 64.
SHAPES = [
    (1, 1, 1, 16, 8),
    (3, 7, 7, 64, 72),
    (5, 2, 3, 48, 64),
    (2, 13, 11, 32, 40),
    (1, 9, 28, 128, 64),
    (2, 14, 14, 192, 16),
    (1, 5, 54, 64, 136),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tile", range(len(hopper.tiles())))
def test_exact_on_integers(tile, shape):
    n, h, w, c, k = shape
    if hopper.plan(tile, n, h, w, c, k) is None:
        pytest.fail("every shape of the list fits every tile")
    check(tile, shape, seed=tile)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 8, 9, 64, 64), (1, 17, 56, 32, 72)], ids=str)
@pytest.mark.parametrize("tile", range(len(hopper.tiles())))
def test_stride_2(tile, shape):
    """Even and odd sizes: the last row and column have a neighbour behind them, or zeros."""
    n, h, w, c, k = shape
    if hopper.plan(tile, n, h, w, c, k, stride=2) is None:  # four runs of input twice do not fit shared memory
        assert hopper.tiles()[tile] >= (120, 2, 0)
        assert c >= 64
        return
    check(tile, shape, seed=tile, stride=2)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_and_epilogues(dtype, with_residual, relu):
    check(2, (2, 9, 10, 32, 72), dtype, with_residual, relu)
    check(5, (3, 7, 7, 128, 64), dtype, with_residual, relu)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("tile", "splits"), [(5, 2), (5, 3), (2, 5), (6, 4)])
def test_split_sums(tile, splits, seed):
    """Blocks that share a sum, of unequal numbers of chunks, in any order."""
    check(tile, (3, 7, 7, 320, 72), splits=splits, seed=seed)


def test_rounding():
    """Products are exact, sums are of float32, one rounding ends them."""
    x, weight, residual = (torch.randn(s, generator=torch.Generator().manual_seed(1)) for s in
                           ((1, 7, 7, 64), (64, 3, 3, 64), (1, 7, 7, 64)))  # fmt: skip
    x, weight, residual = x.half(), weight.half() / 24, residual.half()
    y, _ = hopper.run(5, x, weight, torch.full((64,), 0.7), torch.full((64,), 0.1), residual)
    exact = torch.conv2d(x.permute(0, 3, 1, 2).double(), weight.permute(0, 3, 1, 2).double(), padding=1)
    exact = torch.relu(exact.permute(0, 2, 3, 1) * 0.7 + 0.1 + residual)
    magnitudes = torch.conv2d(
        x.permute(0, 3, 1, 2).double().abs(), weight.permute(0, 3, 1, 2).double().abs(), padding=1
    )
    # 576 additions in float32, and half a unit in the last place of the result.
    bound = 576 * 2.0**-24 * magnitudes.permute(0, 2, 3, 1) + 2.0**-11 * exact.abs() * 1.01 + 1e-7
    assert ((y.double() - exact).abs() <= bound).all()


def test_not_finite():
    """ReLU keeps NaN; zeros beside the image are no products with what lies there."""
    x, weight, scale, shift, _ = case(1, 7, 7, 64, 64, torch.float16)
    weight[:] = 1
    x[0, 3, 3, 5] = float("nan")
    y, _ = hopper.run(5, x, weight, scale, shift)
    near = torch.zeros(7, 7, dtype=torch.bool)
    near[2:5, 2:5] = True
    assert torch.equal(y.isnan(), near[None, :, :, None].expand_as(y))


def test_every_statement_that_orders_is_needed():
    """Two slices of input, residuals, split sums: without a wait, barrier or fence there is a fault or a wrong result.

    But one: of the two barriers around the counter of split sums the first is not missed here, because to the simulator
    a fence publishes all that its block has done."""
    shape = case(1, 7, 7, 128, 8, torch.float16)
    expected = reference(*shape, True)
    ptx, name = (
        compile_cuda(hopper.source(torch.float16, 5, 64), *hopper.FLAGS),
        hopper.compiled(torch.float16, 5, 64).name,
    )

    def run(kernel):
        whole = torch.equal(hopper.run(5, *shape, kernel=kernel)[0], expected)
        return whole and all(
            torch.equal(hopper.run(5, *shape, splits=2, kernel=kernel, seed=s)[0], expected) for s in (0, 1)
        )

    assert run(Kernel(ptx, name))
    pattern = r"^\s*(wgmma\.(wait_group|fence|commit_group)|fence\.|membar|bar\.|cp\.async\.(wait|commit)_group).*$"
    left = [what for _, what in survivors(ptx, pattern, name, run)]
    assert left == ["bar.sync \t0;"]


def test_plans():
    """Division by multiplication is exact where it is used; blocks fit the machine; what cannot be is refused."""
    for tile, (positions, warpgroups, _) in enumerate(hopper.tiles()):
        for n, h, w, c, k in [
            *SHAPES,
            (8, 56, 56, 64, 64),
            (64, 14, 14, 256, 256),
            (256, 7, 7, 512, 512),
            (1, 30, 200, 16, 16),
        ]:
            p = hopper.plan(tile, n, h, w, c, k)
            if p is None:
                assert w + 1 > positions
                continue
            a = p.args
            assert a.lines * a.pitch <= positions
            assert a.tiles * a.lines >= h
            assert a.chunk * a.chunks == c
            assert p.shared <= 227 * 1024
            assert p.threads == 128 * warpgroups
            lines = (n + a.images) * (h + 1) + positions
            for d, inverse, most in ((a.pitch, a.pitch_inverse, positions + 2 * a.pitch + 2),
                                     (a.out_height + 1, a.height_inverse, lines)):  # fmt: skip
                numbers = torch.arange(most)
                assert torch.equal(numbers * inverse >> 32, numbers // d)
    assert all(hopper.plan(t, 1, 7, 7, c, k) is None for t in (0, 5) for c, k in ((8, 64), (40, 64), (64, 20), (64, 0)))
    assert hopper.plan(5, 1, 56, 56, 64, 64) is None
    assert hopper.plan(0, 0, 7, 7, 64, 64) is None

"""The 1x1 convolution of Hopper, compiled for sm_90a and executed in the simulator."""

import functools
import struct

import pytest
import torch
from helpers.cuda_support import find_cuda
from ptxsim import Kernel
from ptxsim.compilers import compile_cuda
from ptxsim.tests.test_faults import survivors

from resnet_fast.gpu.candidates.conv1x1 import Conv1x1Config, plan, tiles
from resnet_fast.gpu.cuda.hopper import kernel_name
from resnet_fast.gpu.layer import Layer

TILES = range(len(tiles()))
# Of Conv1x1Args: output pixels, chunks, split-K, stages, and the two inverses.
PIXELS, CHUNKS, STAGES, WIDTH_INVERSE, HEIGHT_INVERSE = 10, 11, 14, 16, 17


def layer_of(n, h, w, c, k, dtype=torch.float16, stride=1, residual=True, relu=True):
    return Layer(n, h, w, c, k, (1, 1), (stride, stride), (0, 0), dtype, "ieee", residual, relu)


def case(n, h, w, c, k, dtype=torch.float16, stride=1, seed=0):
    """Small integers: sums and results are exact in 16 bits, so any order of addition gives the same bits."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda most, *shape: torch.randint(-most, most + 1, shape, generator=g)  # noqa: E731
    x, residual = draw(2, n, h, w, c).to(dtype), draw(9, n, -(-h // stride), -(-w // stride), k).to(dtype)
    weight = (draw(1, k, c) * (torch.rand(k, c, generator=g) < 0.2)).to(dtype)
    return x, weight, torch.randint(1, 3, (k,), generator=g).float(), draw(5, k).float(), residual


def reference(x, weight, scale, shift, residual, stride=1, relu=True):
    y = (x[:, ::stride, ::stride].double() @ weight.double().T) * scale + shift
    y = y + (0 if residual is None else residual.double())
    return torch.relu(y) if relu else y


@functools.cache
def ptx(dtype, tile):
    source, flags, _ = find_cuda(kernel_name("conv1x1", dtype, tile))
    text = compile_cuda(source, *flags)
    return text, Kernel(text)


def run(config, x, weight, scale, shift, residual=None, stride=1, relu=True, seed=0, kernel=None):
    """y and the simulator's report."""
    n, h, w, c = x.shape
    layer = layer_of(n, h, w, c, len(weight), x.dtype, stride, residual is not None, relu)
    p = plan(layer, config)
    assert p is not None
    y = torch.empty(n, layer.out_height, layer.out_width, len(weight), dtype=x.dtype)
    partial = torch.empty(p.partial_floats) if p.partial_floats else None
    counters = torch.zeros(p.counters, dtype=torch.int32) if p.counters else None
    report = (kernel or ptx(x.dtype, config.conv1x1)[1]).launch(
        (p.blocks, config.splits),
        p.threads,
        *(x, weight, scale, shift, residual, y, partial, counters, struct.pack(f"{len(p.args)}I", *p.args)),
        shared=p.shared,
        outputs=[y],
        scratch=[] if partial is None else [partial],
        names=("x", "weight", "scale", "shift", "residual", "y", "partial", "counters"),
        seed=seed,
    )
    assert counters is None or not counters.any()
    return y, report


def check(config, shape, dtype=torch.float16, stride=1, with_residual=True, relu=True, seed=0):
    x, weight, scale, shift, residual = case(*shape, dtype, stride, seed)
    residual = residual if with_residual else None
    y, report = run(config, x, weight, scale, shift, residual, stride, relu, seed)
    assert torch.equal(y, reference(x, weight, scale, shift, residual, stride, relu).to(dtype))
    return report


# Batch, height, width, channels in and out: the least; whole chunks and blocks; tails of channels, filters and pixels;
# more chunks than any tile has stages.
SHAPES = [(1, 1, 1, 8, 8), (1, 8, 32, 64, 128), (3, 7, 7, 72, 72), (1, 16, 17, 136, 200), (1, 3, 5, 584, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_exact_on_integers(tile, shape):
    check(Conv1x1Config(tile), shape, seed=tile)
    check(Conv1x1Config(tile), shape, seed=tile, with_residual=False)


@pytest.mark.parametrize(("stride", "shape"), [(2, (2, 1, 2, 8, 8)), (2, (3, 7, 6, 64, 72)), (3, (2, 8, 10, 72, 64))])
@pytest.mark.parametrize("tile", [0, 3])
def test_strides(tile, stride, shape):
    """Even and odd sizes, images of one row and one column."""
    check(Conv1x1Config(tile), shape, stride=stride, seed=tile)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_types_and_epilogues(dtype, with_residual, relu, stride):
    check(Conv1x1Config(0), (2, 9, 5, 72, 40), dtype, stride, with_residual, relu)
    check(Conv1x1Config(3, 2), (2, 9, 5, 136, 136), dtype, stride, with_residual, relu)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("tile", "splits"), [(0, 2), (0, 5), (1, 3), (4, 2)])
def test_split_sums(tile, splits, seed):
    """Blocks that share a sum, of unequal numbers of chunks, in any order."""
    check(Conv1x1Config(tile, splits), (2, 7, 7, 328, 72), torch.bfloat16 if splits % 2 else torch.float16, seed=seed)


def test_rounding():
    """Products are exact, sums are of float32, one rounding ends them."""
    g = torch.Generator().manual_seed(1)
    x, weight, residual = (torch.randn(s, generator=g).half() for s in ((1, 7, 7, 192), (64, 192), (1, 7, 7, 64)))
    scale, shift = torch.full((64,), 0.07), torch.full((64,), 0.1)
    y, _ = run(Conv1x1Config(0), x, weight, scale, shift, residual)
    exact = reference(x, weight, scale.double(), shift.double(), residual)
    # 192 additions, a multiplication and two additions in float32, and half a unit in the last place of the result.
    magnitudes = x.double().abs() @ weight.double().abs().T * 0.07 + 0.1 + residual.double().abs()
    assert ((y.double() - exact).abs() <= 195 * 2.0**-24 * magnitudes + 2.0**-11 * exact.abs() * 1.01 + 1e-7).all()


def test_not_finite():
    """ReLU keeps NaN; zeros beside channels and pixels are no products with what lies there."""
    x, weight, scale, shift, residual = case(1, 3, 3, 72, 72)
    weight[:] = 1
    x[0, 1, 2, 71] = float("nan")
    for at in (residual, None):
        y, _ = run(Conv1x1Config(0), x, weight, scale, shift, at)
        expected = torch.zeros(1, 3, 3, 72, dtype=torch.bool)
        expected[0, 1, 2] = True
        assert torch.equal(y.isnan(), expected)


def test_every_statement_that_orders_is_needed():
    """All numbers of steps, residuals, output over the stages, split sums: without a wait, barrier or fence there is
    a fault or a wrong result.

    But one: the first of two barriers around the counter of split sums, because to the simulator a fence publishes all
    that its block has done."""
    deep = case(1, 3, 3, 584, 8)
    shapes = [case(1, 3, 3, 64 * steps, 8) for steps in range(1, 9)]  # all stages at once
    cases = [(1, deep, 0), (1, (*deep[:4], None), 0), *((1, shape, 0) for shape in shapes), (3, deep, 0), (5, deep, 1)]
    text, kernel = ptx(torch.float16, 0)

    def right(kernel, splits, operands, seed):
        y, _ = run(Conv1x1Config(0, splits), *operands, kernel=kernel, seed=seed)
        return torch.equal(y, reference(*operands).half())

    def run_all(kernel):
        return all(right(kernel, *c) for c in cases)

    assert run_all(kernel)
    pattern = r"^\s*(wgmma\.(wait_group|fence|commit_group)|fence\.|membar|bar\.|cp\.async\.(wait|commit)_group).*$"
    left = [what.replace("\t", "").strip() for _, what in survivors(text, pattern, kernel.name, run_all)]
    assert left == ["bar.sync 0;"]


@pytest.mark.parametrize("tile", TILES)
def test_counted(tile):
    """No bank conflict, no sector read in part; a block reads each operand once."""
    layer = (1, 16, 32, 128, 256)
    report = check(Conv1x1Config(tile), layer)
    assert report.conflicts() == []
    assert report.sectors[0] == report.sectors[1]
    t, (n, h, w, c, k) = tiles()[tile], layer
    rows = 64 * t.warpgroups
    # x for each block of filters, filters for each block of pixels, residual and result, scale and shift.
    traffic = n * h * w * c * (k // rows) + k * c * (n * h * w // t.pixels) + 2 * n * h * w * k
    assert report.sectors[0] * 32 <= 2 * traffic + 16 * rows * (k // rows) * (n * h * w // t.pixels) * 4


def test_plans():
    """Division by multiplication is exact where it is used; blocks fit the machine; what cannot be is refused."""
    shapes = [*SHAPES, (64, 56, 56, 64, 256), (256, 14, 14, 1024, 256), (256, 7, 7, 2048, 512), (3, 1, 301, 256, 512)]
    for tile, t in enumerate(tiles()):
        for n, h, w, c, k in shapes:
            for stride, residual in ((1, True), (2, False)):
                layer = layer_of(n, h, w, c, k, stride=stride, residual=residual)
                p = plan(layer, Conv1x1Config(tile))
                a = p.args
                assert a[PIXELS] == layer.pixels
                assert p.threads == 128 * t.warpgroups
                assert p.shared <= 227 * 1024
                assert p.blocks == -(-layer.pixels // t.pixels) * -(-k // (64 * t.warpgroups))
                assert min(2, a[CHUNKS]) <= a[STAGES] <= min(8, a[CHUNKS])
                if a[STAGES] > 2:  # never for fewer blocks
                    assert min(t.blocks, -(-p.blocks // 132)) * (p.shared + 1024) <= 228 * 1024
                numbers = torch.arange(layer.pixels + t.pixels)
                for d, inverse in ((layer.out_width, a[WIDTH_INVERSE]), (layer.out_height, a[HEIGHT_INVERSE])):
                    assert torch.equal(numbers if d == 1 else numbers * inverse >> 32, numbers // d)
    sizes = [(0, 7, 7, 64, 64), (1, 7, 7, 60, 64), (1, 7, 7, 64, 20), (1, 7, 7, 64, 0), (1 << 20, 64, 64, 8, 8)]
    assert all(plan(layer_of(*s), Conv1x1Config(0)) is None for s in sizes)
    assert plan(layer_of(1, 7, 7, 128, 64), Conv1x1Config(0, 3)) is None  # two chunks are not split in three

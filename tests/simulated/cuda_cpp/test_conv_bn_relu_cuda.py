"""The convolution in CUDA C++: compiled for sm_80 by nvcc, run in the simulator behind the operators' own launchers."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers.cuda_support import cuda_device
from helpers.support import Case, assert_error_rule, pair
from ptxsim.sim import GLOBAL_BASE, Fault

from resnet_fast import backends, ops
from resnet_fast.gpu import tune
from resnet_fast.gpu.candidates.cuda import CudaConfig, candidates, plan, tiles
from resnet_fast.gpu.cuda import conv as cuda_conv
from resnet_fast.gpu.layer import A100, Layer

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def exact_float32():
    """float32 means float32, but where a test asks for TF32."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def device():
    with cuda_device() as simulated:
        yield simulated


def random_case(batch, size, channels, out_channels, kernel, stride, padding, dtype, values=torch.randn):
    kernel, stride, padding = pair(kernel), pair(stride), pair(padding)
    out = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, padding, kernel, stride, strict=True)]
    bn = (
        torch.rand(out_channels) + 0.5,
        torch.randn(out_channels),
        torch.randn(out_channels),
        torch.rand(out_channels),
    )
    return Case(
        values(batch, channels, *size).to(dtype),
        values(batch, out_channels, *out).to(dtype),
        values(out_channels, channels, *kernel).to(dtype),
        torch.randn(out_channels),
        bn,
        1e-3,
        stride,
        padding,
    )


SHAPES = [
    # batch, size, channels, filters, kernel, stride, padding
    (2, (9, 7), 64, 64, 3, 1, 1),  # halo
    (3, (5, 6), 40, 17, 3, 1, 1),  # a slice of channels that is not full, odd filters
    (130, (2, 1), 16, 16, 3, 1, 1),  # more images than a block has pixels
    (1, (11, 6), 32, 48, 3, 2, 1),  # gather
    (3, (5, 5), 48, 20, 1, 2, 0),
    (2, (7, 8), 16, 32, 3, 2, 1),  # two taps a step
    (1, (6, 5), 8, 8, 5, 1, 2),
    (1, (13, 10), 3, 64, 7, 2, 3),  # scalar
    (2, (6, 7), 5, 3, (3, 1), (1, 2), (1, 0)),
    (40, (2, 1), 129, 5, 1, 1, 0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(device, shape, dtype):
    case = random_case(*shape, dtype)
    for op in ("conv_bn", "conv_bn_add_relu"):
        out = case.fused(op)
        eager = dataclasses.replace(case, bn=tuple(t.to(dtype) for t in case.bn)).eager(op)
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert_error_rule(out, case.exact(op), [eager], op)
    assert len(device.launches) == 2
    assert all(name.startswith("conv_bn_relu_fwd_kernel<") for name, _ in device.launches)
    assert backends.fallbacks() == {}


def whole(*shape):
    """Integers of one digit: sums of thousands of products are exact in float32, and in any order."""
    return torch.randint(-2, 3, shape).float()


def exact_sum(case):
    """relu(conv + residual) in float64, rounded once."""
    z = F.conv2d(case.x.double(), case.weight.double(), None, case.stride, case.padding) + case.residual.double()
    return z.relu().to(case.x.dtype)


def plain(case):
    return ops.conv_bn_add_relu(case.x, case.residual, case.weight, stride=case.stride, padding=case.padding)


def layer_of(case, precision="ieee"):
    n, c, h, w = case.x.shape
    k, _, *kernel = case.weight.shape
    return Layer(n, h, w, c, k, tuple(kernel), case.stride, case.padding, case.x.dtype, precision, True, True)


INSTANCES = [
    (dtype, precision, i)
    for dtype, precision in ((torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "tf32"))
    for i, t in enumerate(tiles())
    if not t.simt
] + [(torch.float32, "ieee", i) for i, t in enumerate(tiles()) if t.simt]


@pytest.mark.parametrize(("dtype", "precision", "tile"), INSTANCES, ids=str)
def test_every_instance_gives_exact_integers(dtype, precision, tile):
    """Whole and split sums, full and short blocks, several orders of warps and blocks: the same bits each time."""
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    t = tiles()[tile]
    narrow = 36 if t.channels >= 32 else 16  # odd tails of columns in the wide tiles
    channels, kernel, stride = {"halo": (72, 3, 1), "gather": (24, 3, 2), "scalar": (11, 3, 1)}[t.load]
    case = random_case(3, (9, 8), channels, narrow, kernel, stride, 1, dtype, whole)
    expected = exact_sum(case)
    for seed, (pixels, splits) in enumerate([(t.pixels, 1), (t.pixels, 3), (min(t.pixels, 72), 2), (24, 1)]):
        config = CudaConfig(tile, pixels, splits)
        with cuda_device(seed=seed) as device, tune.use(config):
            assert torch.equal(plain(case), expected), config
        ((name, report),) = device.launches
        assert name == cuda_conv.kernel_name(dtype, tile)
        assert bool(report.mma_flops) is not t.simt
        # Elements stored one by one may meet in a bank; fragments never do.
        assert [r for r in report.conflicts() if t.load != "scalar" or r.kind == "matrix"] == [], config


def test_counters_are_left_at_zero(device):
    """The same ones serve the next launch, of another layer, too: one buffer for all, and none is zeroed in between."""
    cases = [random_case(2, (9, 8), c, 32, 3, 1, 1, torch.float16, whole) for c in (72, 256)]
    tile = next(i for i, t in enumerate(tiles()) if t.load == "halo" and t.channels == 64)
    with tune.use(CudaConfig(tile, 64, 2)):
        assert torch.equal(plain(cases[0]), exact_sum(cases[0]))
        counters = cuda_conv.counters_of(cases[0].x, 1)
        for case in cases * 2:
            assert not counters.any()
            assert torch.equal(plain(case), exact_sum(case))
    assert cuda_conv.counters_of(cases[0].x, counters.numel()) is counters
    assert not counters.any()
    # What goes wrong otherwise: the first block to arrive takes itself for the last.
    counters.fill_(1)
    with tune.use(CudaConfig(tile, 64, 2)), pytest.raises(Fault, match="uninitialised"):
        plain(cases[0])


def test_whose_counters(monkeypatch):
    """Each stream has its own, each capture has its own on each of its streams; more of them replace fewer."""
    at = [(0, 1, 0)]
    monkeypatch.setattr(cuda_conv, "_stream", lambda _: at[0])
    x = torch.zeros(1)
    with cuda_device():
        first = cuda_conv.counters_of(x, 10)
        assert cuda_conv.counters_of(x, first.numel()) is first
        more = cuda_conv.counters_of(x, first.numel() + 1)
        assert more.numel() > first.numel()
        assert cuda_conv.counters_of(x, 1) is more
        assert not more.is_inference()
        seen = [first, more]
        for at[0] in ((0, 2, 0), (1, 1, 0), (0, 1, 7), (0, 2, 7), (0, 1, 8)):
            with torch.inference_mode():
                counters = cuda_conv.counters_of(x, 1)
            assert not counters.is_inference()
            assert all(counters is not other for other in seen)
            assert cuda_conv.counters_of(x, 1) is counters
            seen.append(counters)
        at[0] = (0, 1, 0)
        assert cuda_conv.counters_of(x, 1) is more
        at[0] = (0, 1, 8)  # a capture that was over
        assert all(cuda_conv.counters_of(x, 1) is not other for other in seen)
    with cuda_device():
        at[0] = (0, 1, 0)
        assert cuda_conv.counters_of(x, 1) is not more  # another device behind the launches


def test_tf32(device):
    """TF32 keeps 10 bits of a factor, rounded to nearest: 2^-11 each, so 2^-10 of a product, to first order."""
    torch.backends.cudnn.allow_tf32 = True
    for shape in ((2, (9, 8), 64, 64, 3, 1, 1), (2, (9, 8), 32, 16, 3, 2, 1), (2, (9, 8), 3, 16, 3, 1, 1)):
        case = random_case(*shape, torch.float32)
        out = ops.conv_bn(case.x, case.weight, stride=case.stride, padding=1)
        z = F.conv2d(case.x.double(), case.weight.double(), None, case.stride, 1)
        size = F.conv2d(case.x.double().abs(), case.weight.double().abs(), None, case.stride, 1)
        # And a float32 sum of as many products as a filter has.
        bound = size * (2**-10 + 2**-20 + case.weight[0].numel() * 2**-24)
        assert ((out.double() - z).abs() <= bound).all()
        assert ((out.double() - z).abs() > 2**-23 * z.abs()).any()  # it was TF32
    assert all(report.mma_flops for _, report in device.launches)


def test_nan_and_infinity(device):
    """ReLU keeps NaN; a pixel reaches its neighbours alone, and nothing comes in through the padding or a tail."""
    for channels, dtype in ((20, torch.float32), (72, torch.float16), (11, torch.float16)):
        case = random_case(2, (6, 6), channels, 24, 3, 1, 1, dtype, whole)
        case.x[0, 3, 0, 0], case.x[1, 0, 5, 5] = torch.nan, torch.inf
        out, eager = plain(case), F.relu(F.conv2d(case.x, case.weight, padding=1) + case.residual)
        assert torch.equal(out.isnan(), eager.isnan())
        assert torch.equal(out.isinf(), eager.isinf())
        assert out.isnan().any()


def test_layouts_and_views(device):
    """NCHW, slices and tensors that start off a 16-byte boundary give what their copies give."""
    case = random_case(2, (7, 6), 16, 32, 3, 1, 1, torch.bfloat16, whole)
    expected = exact_sum(case)

    def off(t):
        n, c, h, w = t.shape
        moved = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(n, h, w, c).permute(0, 3, 1, 2)
        assert moved.data_ptr() % 16 != 0
        return moved.copy_(t)

    wide = torch.zeros(2, 20, 9, 8, dtype=torch.bfloat16)
    wide[:, 3:19, 1:8, 1:7] = case.x
    for x in (case.x, wide[:, 3:19, 1:8, 1:7], off(case.x), case.x.to(memory_format=torch.channels_last)):
        for residual in (case.residual, off(case.residual)):
            out = ops.conv_bn_add_relu(x, residual, off(case.weight), padding=1)
            assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (2, 0, 5, 5)], ids=str)
def test_empty(device, shape):
    weight = torch.randn(16, shape[1], 3, 3)
    out = ops.conv_bn_relu(torch.randn(shape), weight, torch.ones(16), padding=1)
    assert out.shape == (shape[0], 16, 5, 5)
    assert torch.equal(out, torch.ones_like(out))


@pytest.mark.parametrize("load", ["gather", "scalar"])
def test_offsets_beyond_32_bits(device, load):
    """The second image of such maps begins 4.6e9 bytes on, where nothing lies: the fault names the full address."""
    case = random_case(2, (1, 1), 16, 16, 1, 1, 0, torch.float16)
    huge = dataclasses.replace(layer_of(case), height=12000, width=12000, stride=(12000, 12000))
    assert huge.pixels == 2
    weight = case.weight.permute(0, 2, 3, 1).contiguous()
    arguments = (case.x, weight, torch.ones(16), torch.zeros(16), None, torch.zeros_like(case.x))
    tile = next(i for i, t in enumerate(tiles()) if t.load == load and not t.simt)
    with pytest.raises(Fault) as found:
        cuda_conv.conv_bn_relu(huge, CudaConfig(tile, 16), *arguments)
    assert found.value.kind == "out-of-bounds"
    assert 0 <= found.value.address - GLOBAL_BASE - 12000 * 12000 * 16 * 2 < 2**20


def test_candidates_are_few_and_fit():
    for channels, filters, size in ((3, 64, 224), (16, 16, 32), (64, 64, 56), (512, 512, 7), (2048, 512, 7)):
        for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")):
            for batch in (1, 8, 64):
                layer = Layer(
                    *(batch, size, size, channels, filters, (3, 3), (1, 1), (1, 1), dtype, precision, True, True)
                )
                found = candidates(layer, A100)
                assert 1 <= len(found) <= 4
                assert len(set(found)) == len(found)
                for config in found:
                    assert plan(layer, config).shared <= A100.shared


@pytest.mark.parametrize(("width", "load"), [(56, "halo"), (4000, "gather")])
def test_wide_images(width, load):
    """A halo is two rows of an image: where shared memory cannot hold it, taps are gathered one by one."""
    layer = Layer(1, 40, width, 64, 64, (3, 3), (1, 1), (1, 1), torch.float16, "ieee", True, True)
    found = candidates(layer, A100)
    assert tiles()[found[0].tile].load == load
    assert all(plan(layer, c).shared <= A100.shared for c in found)
    assert load == "halo" or not any(tiles()[c.tile].load == "halo" for c in found)


def test_rows_that_follow_the_last_slice(device):
    """Images wider than 48 pixels: what the steps of a slice of channels do not copy follows after them."""
    case = random_case(1, (3, 160), 72, 16, 3, 1, 1, torch.float16, whole)
    halo = [i for i, t in enumerate(tiles()) if t.load == "halo" and not t.simt]
    for tile in halo:
        with tune.use(CudaConfig(tile, 64)):
            assert torch.equal(plain(case), exact_sum(case))
    assert len(device.launches) == len(halo)


def test_what_cannot_be_is_refused():
    layer = Layer(1, 8, 8, 16, 16, (3, 3), (2, 2), (1, 1), torch.float16, "ieee", False, True)
    halo = next(i for i, t in enumerate(tiles()) if t.load == "halo")
    assert plan(layer, CudaConfig(halo, 64)) is None  # stride 2
    for config, message in (
        (CudaConfig(99, 64), "tile is 99, want 0 to"),
        (CudaConfig(halo, 0), "tile_pixels is 0, want 1 to 256"),
        (CudaConfig(halo, 64, 0), "splits is 0, want at least 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            plan(layer, config)

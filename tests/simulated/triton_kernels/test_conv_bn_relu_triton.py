"""The Triton convolution: compiled for sm_80 and executed in the simulator, behind the operators' own launchers."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import triton
from helpers.support import Case, assert_error_rule, name_of, pair
from ptxsim.device import simulated
from ptxsim.sim import GLOBAL_BASE, Fault

from resnet_fast import ops
from resnet_fast._triton import conv_bn_relu
from resnet_fast.gpu import tune
from resnet_fast.gpu.candidates.triton import Config, candidates, tiles
from resnet_fast.gpu.layer import A100, Layer

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def exact_float32():
    """float32 means float32, but where a test asks for TF32."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def random_case(batch, size, channels, out_channels, kernel, stride, padding, dtype, values=torch.randn):
    kernel, stride, padding = pair(kernel), pair(stride), pair(padding)
    x = values(batch, channels, *size)
    weight = values(out_channels, channels, *kernel)
    out = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, padding, kernel, stride, strict=True)]
    bn = (
        torch.rand(out_channels) + 0.5,
        torch.randn(out_channels),
        torch.randn(out_channels),
        torch.rand(out_channels),
    )
    case = Case(x, values(batch, out_channels, *out), weight, torch.randn(out_channels), bn, 1e-3, stride, padding)
    images = {name: getattr(case, name).to(dtype) for name in ("x", "residual", "weight")}
    return Case(**images, bias=case.bias, bn=bn, eps=1e-3, stride=stride, padding=padding)


SHAPES = [
    # batch, size, channels, filters, kernel, stride, padding
    (2, (9, 7), 64, 64, 3, 1, 1),  # tap by tap, whole channels
    (1, (11, 6), 32, 48, 3, 2, 1),
    (3, (5, 5), 48, 17, 1, 2, 0),
    (1, (13, 10), 3, 64, 7, 2, 3),  # taps and channels mixed
    (2, (6, 7), 5, 3, (3, 1), (1, 2), (1, 0)),
    (40, (2, 1), 129, 5, 1, 1, 0),
    (130, (2, 1), 16, 16, 3, 1, 1),  # more images than a block has pixels
]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_values(simulated_device, shape, dtype):
    case = random_case(*shape, dtype)
    for op in ("conv_bn", "conv_bn_add_relu"):
        out = case.fused(op)
        eager = dataclasses.replace(case, bn=tuple(t.to(dtype) for t in case.bn)).eager(op)
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert_error_rule(out, case.exact(op), [eager], op)
    assert len(simulated_device.launches) >= 2


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


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("channels", "filters"), [(64, 128), (32, 32), (16, 16), (20, 64)], ids=name_of)
def test_every_tile_gives_exact_integers(simulated_device, channels, filters, dtype):
    """All tiles for 8.x, with undivided and split sums; 20 channels mix taps and channels in a step."""
    case = random_case(3, (9, 8), channels, filters, 3, 1, 1, dtype, whole)
    expected = exact_sum(case)
    for config in tiles(layer_of(case), A100):
        for split in (1, 3):
            split_config = Config(*list(config.__dict__.values())[:-1], split_k=split)
            with tune.use(split_config):
                assert torch.equal(plain(case), expected), split_config


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_eight_warps(simulated_device, kernel):
    """PyTorch's own Triton template was miscompiled with 8 warps for filters larger than 1x1 (pytorch#173068)."""
    case = random_case(2, (10, 9), 64, 64, kernel, 1, kernel // 2, torch.bfloat16, whole)
    for block_m, block_n, stages in ((128, 64, 3), (64, 64, 4), (256, 32, 2)):
        with tune.use(Config(block_m, block_n, 32, 8, stages)):
            assert torch.equal(plain(case), exact_sum(case))


def test_tf32(simulated_device):
    """TF32 keeps 10 bits of a factor: an error of at most 2^-10 each, so of 2^-9 of a product, to first order."""
    torch.backends.cudnn.allow_tf32 = True
    case = random_case(2, (9, 8), 64, 64, 3, 1, 1, torch.float32)
    out = ops.conv_bn(case.x, case.weight, stride=1, padding=1)
    z = F.conv2d(case.x.double(), case.weight.double(), padding=1)
    bound = F.conv2d(case.x.double().abs(), case.weight.double().abs(), padding=1) * (2**-9 + 2**-19)
    assert ((out.double() - z).abs() <= bound).all()
    assert ((out.double() - z).abs() > 2**-24 * z.abs()).any()  # it was TF32
    assert any(report.mma_flops for _, report in simulated_device.launches)
    exact = random_case(2, (9, 8), 64, 64, 3, 1, 1, torch.float32, whole)
    for config in tiles(layer_of(exact, "tf32"), A100):
        with tune.use(config):
            assert torch.equal(plain(exact), exact_sum(exact)), config


def test_nan_and_infinity(simulated_device):
    """ReLU keeps NaN; a pixel reaches its neighbours alone, and nothing comes in through the padding or a tail."""
    case = random_case(2, (6, 6), 20, 24, 3, 1, 1, torch.float32)
    case.x[0, 3, 0, 0], case.x[1, 0, 5, 5] = torch.nan, torch.inf
    out, eager = plain(case), F.relu(F.conv2d(case.x, case.weight, padding=1) + case.residual)
    assert torch.equal(out.isnan(), eager.isnan())
    assert torch.equal(out.isinf(), eager.isinf())
    assert out.isnan().any()


def test_layouts_and_views(simulated_device):
    """NCHW, slices and tensors that start off a 16-byte boundary give what their copies give."""
    case = random_case(2, (7, 6), 16, 32, 3, 1, 1, torch.bfloat16, whole)
    expected = exact_sum(case)
    wide = torch.zeros(2, 20, 9, 8, dtype=torch.bfloat16)
    wide[:, 3:19, 1:8, 1:7] = case.x
    shifted = torch.empty(case.x.numel() + 1, dtype=torch.bfloat16)[1:].view(2, 7, 6, 16).permute(0, 3, 1, 2)
    shifted.copy_(case.x)
    assert shifted.data_ptr() % 16 != 0
    for x in (case.x, wide[:, 3:19, 1:8, 1:7], shifted, case.x.to(memory_format=torch.channels_last)):
        case.x = x
        assert torch.equal(plain(case), expected)


@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (2, 0, 5, 5)], ids=name_of)
def test_empty(simulated_device, shape):
    weight = torch.randn(16, shape[1], 3, 3)
    out = ops.conv_bn_relu(torch.randn(shape), weight, torch.ones(16), padding=1)
    assert out.shape == (shape[0], 16, 5, 5)
    assert torch.equal(out, torch.ones_like(out))


def test_offsets_beyond_32_bits(simulated_device):
    """The second image of such maps begins 4.6e9 bytes on, where nothing lies: the fault names the full address."""
    case = random_case(2, (1, 1), 16, 16, 1, 1, 0, torch.float16)
    real = layer_of(case)
    huge = dataclasses.replace(real, height=12000, width=12000, stride=(12000, 12000))
    assert huge.pixels == real.pixels == 2
    weight = case.weight.permute(0, 2, 3, 1).contiguous()
    arguments = (case.x, weight, torch.ones(16), torch.zeros(16), None, torch.zeros_like(case.x))
    with pytest.raises(Fault) as found:
        conv_bn_relu.conv_bn_relu(huge, Config(64, 16, 16, 4, 2), *arguments)
    assert found.value.kind == "out-of-bounds"
    assert 0 <= found.value.address - GLOBAL_BASE - 12000 * 12000 * 16 * 2 < 2**20


def test_filters_of_more_than_32_taps_in_a_row(simulated_device):
    """Which taps lie in the padding is a bit each: longer filters need another way."""
    for kernel, size in (((33, 1), (20, 3)), ((1, 35), (2, 9))):
        case = random_case(1, size, 16, 8, kernel, 1, (kernel[0] // 2, kernel[1] // 2), torch.float16, whole)
        assert torch.equal(plain(case), exact_sum(case)), kernel


def test_taps_beyond_32_bits(simulated_device):
    """A row of such an image has 4.3e9 bytes: the second row of taps begins where only 64 bits reach."""
    case = random_case(1, (3, 3), 16, 16, 3, 1, 0, torch.float16)
    real = layer_of(case)
    huge = dataclasses.replace(real, height=3, width=2**27 + 1, kernel=(3, 1), stride=(1, 2**27 + 1), residual=False)
    assert huge.pixels == 1
    weight = torch.ones(16, 3, 1, 16, dtype=torch.float16)
    arguments = (case.x, weight, torch.ones(16), torch.zeros(16), None, torch.zeros(1, 16, 1, 1, dtype=torch.float16))
    with pytest.raises(Fault) as found:
        conv_bn_relu.conv_bn_relu(huge, Config(64, 16, 16, 4, 2), *arguments)
    assert found.value.kind == "out-of-bounds"
    assert 0 <= found.value.address - GLOBAL_BASE - (2**27 + 1) * 16 * 2 < 2**20


def test_repeatable():
    """The simulator shuffles blocks and warps by its seed: split sums do not depend on who comes first."""
    case = random_case(1, (8, 8), 128, 64, 3, 1, 1, torch.float16)
    results = []
    for seed in range(3):
        with simulated(seed=seed), tune.use(Config(64, 64, 32, 2, 3, split_k=4)):
            results.append(plain(case))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_library(simulated_device):
    case = random_case(2, (7, 6), 16, 32, 3, 1, 1, torch.float32, whole)
    with tune.use(tune.LIBRARY):
        assert torch.equal(plain(case), exact_sum(case))
    assert [name for name, _ in simulated_device.launches] == ["_epilogue_kernel"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.randn(8, 5, 3, 3)}, r"x has 4 channels, want 5"),
        ({"weight": torch.randn(8, 4, 3, 3).half()}, r"weight has dtype torch.float16, want torch.float32"),
        ({"bias": torch.randn(7)}, r"bias has shape \[7\], want \[8\]"),
        ({"running_mean": torch.randn(8)}, r"running_mean and running_var come together"),
        ({"bn_weight": torch.randn(8)}, r"bn_weight and bn_bias come with"),
        ({"residual": torch.randn(2, 8, 3, 3)}, r"residual has shape \[2, 8, 3, 3\], want \[2, 8, 4, 4\]"),
        ({"residual": torch.randn(2, 8, 4, 4).half()}, r"residual has dtype torch.float16, want torch.float32"),
        ({"stride": 0}, r"stride is \[0, 0\], want 1 to"),
    ],
    ids=name_of,
)
def test_bad_arguments(simulated_device, change, message):
    arguments = {
        "x": torch.randn(2, 4, 6, 6),
        "residual": torch.randn(2, 8, 4, 4),
        "weight": torch.randn(8, 4, 3, 3),
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        ops.conv_bn_add_relu(**arguments)
    assert not simulated_device.launches


def test_candidates_are_few_and_fit():
    for channels, filters, size in ((3, 64, 224), (16, 16, 32), (64, 64, 56), (512, 512, 7), (2048, 512, 7)):
        for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")):
            layer = Layer(8, size, size, channels, filters, (3, 3), (1, 1), (1, 1), dtype, precision, True, True)
            found = candidates(layer, A100)
            assert 1 <= len(found) <= 6
            assert len(set(found)) == len(found)
            for config in found:
                operands = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
                assert operands * (config.num_stages - 1) <= A100.shared
                assert config.block_n < 2 * triton.next_power_of_2(max(16, filters))

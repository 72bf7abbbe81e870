"""The convolution, compiled for sm_80 and executed in the simulator behind the operators' own launchers."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers.conv_support import (
    SPLIT_SUMS,
    assert_exact,
    exact_sum,
    first_tile,
    layer_of,
    misaligned,
    plain,
    random_case,
    whole_case,
)
from helpers.cuda_support import simulated_backend
from helpers.support import assert_error_rule, channels_last, name_of
from ptxsim.sim import GLOBAL_BASE, Fault

from resnet_fast import backends, ops
from resnet_fast._triton import conv_bn_relu as triton_conv
from resnet_fast.gpu import tune
from resnet_fast.gpu.candidates import cuda as cuda_configs
from resnet_fast.gpu.candidates import triton as triton_configs
from resnet_fast.gpu.candidates.cuda import CudaConfig, plan
from resnet_fast.gpu.candidates.triton import Config
from resnet_fast.gpu.cuda import conv as cuda_conv
from resnet_fast.gpu.layer import A100, Layer

pytestmark = pytest.mark.usefixtures("exact_float32")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


SHAPES = [
    # batch, size, channels, filters, kernel, stride, padding
    (2, (9, 7), 64, 64, 3, 1, 1),  # halo in CUDA C++; in Triton tap by tap, whole channels
    (3, (5, 6), 40, 17, 3, 1, 1),  # a slice of channels that is not full, odd filters
    (130, (2, 1), 16, 16, 3, 1, 1),  # more images than a block has pixels
    (1, (11, 6), 32, 48, 3, 2, 1),  # gather
    (3, (5, 5), 48, 20, 1, 2, 0),
    (2, (7, 8), 16, 32, 3, 2, 1),  # two taps a step
    (1, (6, 5), 8, 8, 5, 1, 2),
    (1, (13, 10), 3, 64, 7, 2, 3),  # scalar; in Triton taps and channels mixed
    (2, (6, 7), 5, 3, (3, 1), (1, 2), (1, 0)),
    (40, (2, 1), 129, 5, 1, 1, 0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_values(device, kernel, shape, dtype):
    case = random_case(*shape, dtype)
    for op in ("conv_bn", "conv_bn_add_relu"):
        out = case.fused(op)
        eager = dataclasses.replace(case, bn=tuple(t.to(dtype) for t in case.bn)).eager(op)
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert_error_rule(out, case.exact(op), [eager], op)
    convolutions = [name for name, _ in device.launches if name.startswith(kernel)]
    assert len(convolutions) == 2
    assert backends.fallbacks() == {}


# TF32 keeps 10 bits of a factor: in Triton an error of at most 2^-10 each, so of 2^-9 of a product, to first order; in
# CUDA C++ rounded to nearest, half of that; and a float32 sum of as many products as a filter has.
TF32_ERROR = {"triton": 2**-9 + 2**-19, "cuda": 2**-10 + 2**-20}


def test_tf32(device, backend, kernel):
    torch.backends.cudnn.allow_tf32 = True
    for shape in ((2, (9, 8), 64, 64, 3, 1, 1), (2, (9, 8), 32, 16, 3, 2, 1), (2, (9, 8), 3, 16, 3, 1, 1)):
        case = random_case(*shape, torch.float32)
        out = ops.conv_bn(case.x, case.weight, stride=case.stride, padding=1)
        z = F.conv2d(case.x.double(), case.weight.double(), None, case.stride, 1)
        size = F.conv2d(case.x.double().abs(), case.weight.double().abs(), None, case.stride, 1)
        bound = size * (TF32_ERROR[backend] + case.weight[0].numel() * 2**-24)
        assert ((out.double() - z).abs() <= bound).all()
        assert ((out.double() - z).abs() > 2**-23 * z.abs()).any()  # it was TF32
    assert all(report.mma_flops for name, report in device.launches if name.startswith(kernel))


def test_nan_and_infinity(device):
    """ReLU keeps NaN; a pixel reaches its neighbours alone, and nothing comes in through the padding or a tail."""
    for channels, dtype in ((20, torch.float32), (72, torch.float16), (11, torch.float16)):
        case = whole_case(2, (6, 6), channels, 24, 3, 1, 1, dtype)
        case.x[0, 3, 0, 0], case.x[1, 0, 5, 5] = torch.nan, torch.inf
        out, eager = plain(case), F.relu(F.conv2d(case.x, case.weight, padding=1) + case.residual)
        assert torch.equal(out.isnan(), eager.isnan())
        assert torch.equal(out.isinf(), eager.isinf())
        assert out.isnan().any()


def test_layouts_and_views(device):
    """NCHW, slices and tensors that start off a 16-byte boundary give what their copies give."""
    case = whole_case(2, (7, 6), 16, 32, 3, 1, 1, torch.bfloat16)
    expected = exact_sum(case)

    wide = torch.zeros(2, 20, 9, 8, dtype=torch.bfloat16)
    wide[:, 3:19, 1:8, 1:7] = case.x
    for x in (case.x, wide[:, 3:19, 1:8, 1:7], misaligned(case.x), channels_last(case.x)):
        for residual in (case.residual, misaligned(case.residual)):
            for weight in (case.weight, misaligned(case.weight)):
                assert torch.equal(ops.conv_bn_add_relu(x, residual, weight, padding=1), expected)


@pytest.mark.parametrize("shape", [(0, 8, 5, 5), (2, 0, 5, 5)], ids=name_of)
def test_empty(device, shape):
    weight = torch.randn(16, shape[1], 3, 3)
    out = ops.conv_bn_relu(torch.randn(shape), weight, torch.ones(16), padding=1)
    assert out.shape == (shape[0], 16, 5, 5)
    assert torch.equal(out, torch.ones_like(out))


def configurations(backend):
    """One of each way to load the input: the launcher and what it is given."""
    if backend == "triton":
        return triton_conv.conv_bn_relu, [Config(64, 16, 16, 4, 2)]
    return cuda_conv.conv_bn_relu, [CudaConfig(first_tile(load), 16) for load in ("gather", "scalar")]


def test_offsets_beyond_32_bits(device, backend):
    """The second image of such maps begins 4.6e9 bytes on, where nothing lies: the fault names the full address."""
    case = random_case(2, (1, 1), 16, 16, 1, 1, 0, torch.float16)
    huge = dataclasses.replace(layer_of(case), height=12000, width=12000, stride=(12000, 12000))
    assert huge.pixels == 2
    weight = case.weight.permute(0, 2, 3, 1).contiguous()
    run, configs = configurations(backend)
    for config in configs:
        with pytest.raises(Fault) as found:
            run(huge, config, case.x, weight, torch.ones(16), torch.zeros(16), None, torch.zeros_like(case.x))
        assert found.value.kind == "out-of-bounds"
        assert 0 <= found.value.address - GLOBAL_BASE - 12000 * 12000 * 16 * 2 < 2**20


def test_filters_of_more_than_32_taps_in_a_row(device):
    """Which taps lie in the padding is a bit each: longer filters need another way."""
    for kernel, size in (((33, 1), (20, 3)), ((1, 35), (2, 9))):
        assert_exact(whole_case(1, size, 16, 8, kernel, 1, (kernel[0] // 2, kernel[1] // 2), torch.float16), kernel)


def test_split_sums_do_not_depend_on_who_comes_first(backend):
    """The simulator shuffles blocks and warps by its seed."""
    case, results = random_case(2, (8, 8), 128, 32, 3, 1, 1, torch.float16), []
    for seed in range(3):
        with simulated_backend(backend, seed=seed), tune.use(SPLIT_SUMS[backend]):
            results.append(plain(case))
    assert all(torch.equal(r, results[0]) for r in results[1:])


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
def test_bad_arguments(device, change, message):
    arguments = {"x": torch.randn(2, 4, 6, 6), "residual": torch.randn(2, 8, 4, 4), "weight": torch.randn(8, 4, 3, 3)}
    with pytest.raises(RuntimeError, match=message):
        ops.conv_bn_add_relu(**arguments | change)
    assert not device.launches


def shared_bytes(backend, layer, config):
    """Of a block: as the plan has it, or of the steps that are under way at once."""
    if backend == "cuda":
        return plan(layer, config).shared
    return (config.block_m + config.block_n) * config.block_k * layer.dtype.itemsize * (config.num_stages - 1)


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_candidates_are_few_and_fit(backend, batch):
    candidates, most = {"triton": (triton_configs.candidates, 6), "cuda": (cuda_configs.candidates, 4)}[backend]
    for channels, filters, size in ((3, 64, 224), (16, 16, 32), (64, 64, 56), (512, 512, 7), (2048, 512, 7)):
        for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")):
            layer = Layer(batch, size, size, channels, filters, (3, 3), (1, 1), (1, 1), dtype, precision, True, True)
            found = candidates(layer, A100)
            assert 1 <= len(found) <= most
            assert len(set(found)) == len(found)
            assert all(shared_bytes(backend, layer, config) <= A100.shared for config in found)
            # No wider than the next power of two of the filters.
            assert backend == "cuda" or all(c.block_n < 4 * max(16, filters) for c in found)

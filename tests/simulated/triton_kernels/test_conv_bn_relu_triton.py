"""What is true of the convolution in Triton alone: its tiles, its offsets, the library beside it."""

import dataclasses

import pytest
import torch
from helpers.conv_support import assert_exact, exact_sum, layer_of, plain, random_case, whole_case
from helpers.support import name_of
from ptxsim.sim import GLOBAL_BASE, Fault

from resnet_fast._triton import conv_bn_relu
from resnet_fast.gpu import tune
from resnet_fast.gpu.candidates.triton import Config, tiles
from resnet_fast.gpu.layer import A100

pytestmark = pytest.mark.usefixtures("exact_float32")
PRECISIONS = [(torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")]


@pytest.mark.parametrize(("dtype", "precision"), PRECISIONS, ids=name_of)
@pytest.mark.parametrize(("channels", "filters"), [(64, 128), (32, 32), (16, 16), (20, 64)], ids=name_of)
def test_every_tile_gives_exact_integers(simulated_device, channels, filters, dtype, precision):
    """All tiles for 8.x, with undivided and split sums; 20 channels mix taps and channels in a step."""
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    case = whole_case(3, (9, 8), channels, filters, 3, 1, 1, dtype)
    expected = exact_sum(case)
    for config in tiles(layer_of(case, precision), A100):
        for split in (1, 3):
            with tune.use(dataclasses.replace(config, split_k=split)):
                assert torch.equal(plain(case), expected), (config, split)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_eight_warps(simulated_device, kernel):
    """PyTorch's own Triton template was miscompiled with 8 warps for filters larger than 1x1 (pytorch#173068)."""
    case = whole_case(2, (10, 9), 64, 64, kernel, 1, kernel // 2, torch.bfloat16)
    for block_m, block_n, stages in ((128, 64, 3), (64, 64, 4), (256, 32, 2)):
        with tune.use(Config(block_m, block_n, 32, 8, stages)):
            assert_exact(case)


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


def test_library(simulated_device):
    case = whole_case(2, (7, 6), 16, 32, 3, 1, 1, torch.float32)
    with tune.use(tune.LIBRARY):
        assert_exact(case)
    assert [name for name, _ in simulated_device.launches] == ["_epilogue_kernel"]

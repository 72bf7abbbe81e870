"""What the convolution in CUDA C++ costs, counted by the simulator, at the four stages of a ResNet, float16, batch 8.

Traffic with the second-level cache is that of all requests to global memory in whole sectors: no first-level cache is
counted on. It is compared with the compulsory bytes: input, residual, output and filters once. Wavefronts of shared
memory are those of loads and stores, and those in which copies arrive, 128 bytes each.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers.cuda_support import cuda_device

import resnet_fast
from resnet_fast import ops
from resnet_fast.gpu import tune
from resnet_fast.gpu.candidates import cuda as cuda_configs
from resnet_fast.gpu.candidates.cuda import CudaConfig, tiles
from resnet_fast.gpu.layer import A100, Gpu, Layer

MMA = 2 * 16 * 8 * 16
H100 = Gpu(90, 132, 227 * 1024)


def block(batch, size, channels, dtype=torch.float16):
    """One convolution of a residual block: x, residual, weight; small integers, so that sums are exact."""
    whole = lambda *shape: torch.randint(-2, 3, shape).to(dtype)  # noqa: E731
    x = whole(batch, channels, size, size).to(memory_format=torch.channels_last)
    return x, whole(*x.shape).to(memory_format=torch.channels_last), whole(channels, channels, 3, 3)


def layer_of(x):
    n, c, h, w = x.shape
    return Layer(n, h, w, c, c, (3, 3), (1, 1), (1, 1), x.dtype, "ieee", True, True)


def run(x, residual, weight, config):
    with cuda_device() as device, tune.use(config):
        y = ops.conv_bn_add_relu(x, residual, weight, padding=1)
    ((_, report),) = device.launches
    z = F.conv2d(x.float(), weight.float(), padding=1) + residual.float()
    assert torch.equal(y, z.relu().half())
    return report


def costs(x, weight, report):
    """mma work over the useful one, wavefronts for each mma, second-level traffic over the compulsory bytes."""
    products = sum(report.mma_flops.values())
    copied = sum(r.bytes for r in report.rows if r.kind == "async_copy")
    compulsory = 3 * x.nbytes + weight.nbytes
    return (
        products / (2 * x.numel() * weight[0].numel()),
        (report.wavefronts[0] + copied / 128) / (products / MMA),
        report.sectors[0] * 32 / compulsory,
    )


# Shape, configuration, most traffic. Those at 14x14 and 7x7 read the filters as seldom as 96 and 128 blocks allow; the
# model of clocks puts others before them on an A100, where 128 blocks are one more than a round.
STAGES = [
    ((8, 56, 64), (256, 64, 1), 1.9),
    ((8, 28, 128), (256, 32, 1), 4.0),
    ((8, 14, 256), (264, 32, 2), 5.5),
    ((8, 7, 512), (200, 32, 4), 3.8),
]


def config_of(pixels, channels, splits):
    i = next(i for i, t in enumerate(tiles()) if t.load == "halo" and t.channels == channels and t.pixels >= pixels)
    return CudaConfig(i, pixels, splits)


@pytest.mark.parametrize(("shape", "config", "most"), STAGES, ids=str)
def test_stages(shape, config, most):
    x, residual, weight = block(*shape)
    config = config_of(*config)
    assert config in cuda_configs.candidates(layer_of(x), A100) + cuda_configs.candidates(layer_of(x), H100)
    report = run(x, residual, weight, config)
    work, wavefronts, traffic = costs(x, weight, report)
    blocks = cuda_configs.plan(layer_of(x), config).blocks * config.splits
    print(f"{shape}: {config}, {blocks} blocks: {work:.3f} work, {wavefronts:.2f} wavefronts, {traffic:.2f} traffic")
    assert traffic <= most
    assert wavefronts <= 1.7
    assert work <= 1.1
    assert blocks >= 96 if shape != (8, 7, 512) else 100
    assert report.sectors[0] == report.sectors[1]
    assert report.conflicts() == []


@pytest.mark.parametrize("shape", [(64, 32, 16), (64, 16, 32), (64, 8, 64)], ids=str)
def test_narrow_layers_are_not_padded(shape):
    """The layers of cifar_resnet32, each by the tile that the model prefers: no mma is there for padding."""
    x, residual, weight = block(*shape)
    config = cuda_configs.default(layer_of(x), A100)
    report = run(x, residual, weight, config)
    work, _, traffic = costs(x, weight, report)
    print(f"{shape}: {config}: {work:.3f} work, {traffic:.2f} traffic")
    assert work <= 1.05
    assert report.sectors[0] == report.sectors[1]
    assert report.conflicts() == []


def test_memory_traffic_of_a_basic_block():
    """Two kernels: image, both filters, the map between, image again as residual, result; each byte of it once."""
    model = resnet_fast.blocks.BasicBlock(64, 64).eval().half()
    x = torch.randn(2, 64, 56, 56).half().to(memory_format=torch.channels_last)
    with torch.no_grad(), cuda_device() as device:
        model(x)
        device.launches.clear()  # the filters are packed now
        model(x)
    assert len(device.launches) == 2
    moved = sum(sum(report.compulsory_bytes) for _, report in device.launches)
    compulsory = 5 * x.nbytes + 2 * model.conv1.weight.nbytes
    assert compulsory < moved <= 1.05 * compulsory


def test_split_sums_are_written_once_and_repeatable():
    """All blocks of a sum but the last write their part, in whichever order they come; the result does not change."""
    x = torch.randn(2, 128, 8, 8).half()
    weight = torch.randn(32, 128, 3, 3).half()
    config, results = config_of(128, 32, 4), []
    for seed in range(4):
        with cuda_device(seed=seed) as device, tune.use(config):
            results.append(ops.conv_bn_relu(x, weight, padding=1))
        ((_, report),) = device.launches
        partial = next(b for name, b in report.buffers.items() if name == "arg6")
        assert partial["written"] == partial["read"] == 3 * results[0].numel() * 4
    assert all(torch.equal(r, results[0]) for r in results[1:])

"""What the convolution in CUDA C++ costs, counted by the simulator, at the four stages of a ResNet, float16, batch 8.

Traffic with the second-level cache is that of all requests to global memory in whole sectors: no first-level cache is
counted on. It is compared with the compulsory bytes: input, residual, output and filters once. Wavefronts of shared
memory are those of loads and stores, and those in which copies arrive, 128 bytes each.
"""

import pytest
from helpers.conv_support import assert_exact, block_case, layer_of
from helpers.cuda_support import cuda_device

from resnet_fast.gpu import tune
from resnet_fast.gpu.candidates import cuda as cuda_configs
from resnet_fast.gpu.candidates.cuda import CudaConfig, tiles
from resnet_fast.gpu.layer import A100, Gpu

MMA = 2 * 16 * 8 * 16
H100 = Gpu(90, 132, 227 * 1024)


def run(case, config):
    with cuda_device() as device, tune.use(config):
        assert_exact(case)
    ((_, report),) = device.launches
    return report


def costs(case, report):
    """mma work over the useful one, wavefronts for each mma, second-level traffic over the compulsory bytes."""
    products = sum(report.mma_flops.values())
    copied = sum(r.bytes for r in report.rows if r.kind == "async_copy")
    compulsory = 3 * case.x.nbytes + case.weight.nbytes
    return (
        products / (2 * case.x.numel() * case.weight[0].numel()),
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
    case = block_case(*shape)
    config = config_of(*config)
    assert config in cuda_configs.candidates(layer_of(case), A100) + cuda_configs.candidates(layer_of(case), H100)
    report = run(case, config)
    work, wavefronts, traffic = costs(case, report)
    blocks = cuda_configs.plan(layer_of(case), config).blocks * config.splits
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
    case = block_case(*shape)
    config = cuda_configs.default(layer_of(case), A100)
    report = run(case, config)
    work, _, traffic = costs(case, report)
    print(f"{shape}: {config}: {work:.3f} work, {traffic:.2f} traffic")
    assert work <= 1.05
    assert report.sectors[0] == report.sectors[1]
    assert report.conflicts() == []

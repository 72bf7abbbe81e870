"""The weight gradient of Hopper on the GPU it is for: exact integers with every tile, and its times beside cuDNN's."""

import functools

import pytest
import torch

from resnet_fast.gpu import timing, tune
from resnet_fast.gpu import training_operators as training
from resnet_fast.gpu.candidates.weight_gradient import GradientConfig, candidates, plan, tiles
from resnet_fast.gpu.layer import gpu_of, layer_of

# Batch, size, channels in and out, stride: cifar_resnet32 and resnet18 at batch 128.
STAGES = [
    *((128, s, c, c, 1) for s, c in ((32, 16), (16, 32), (8, 64), (56, 64), (28, 128), (14, 256), (7, 512))),
    *((128, s, c, 2 * c, 2) for s, c in ((32, 16), (16, 32), (56, 64), (28, 128), (14, 256))),
]


@pytest.fixture(autouse=True)
def hopper(gpu):
    if gpu == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"compute capability {torch.cuda.get_device_capability()}: these kernels are for 9.0 alone")


def make_layer(batch, size, channels, filters, stride, dtype):
    shape, kernel = (batch, channels, *size), (filters, 3, 3)
    role = "weight gradient"
    return layer_of(shape, kernel, (stride,) * 2, (1, 1), dtype, residual=False, relu=True, role=role)


def integers(gpu, layer):
    """grad, y, coefficients, x, scale_shift and weight of small integers."""

    def image(channels, height, width):
        found = torch.randint(-2, 3, (layer.batch, height, width, channels), device=gpu)
        return found.to(layer.dtype).permute(0, 3, 1, 2)

    rows = lambda *shape: torch.randint(-1, 2, shape, device=gpu).float()  # noqa: E731
    grad, y = (image(layer.out_channels, layer.out_height, layer.out_width) for _ in range(2))
    x = image(layer.channels, layer.height, layer.width)
    weight = torch.zeros(layer.out_channels, layer.channels, 3, 3, device=gpu)
    return grad, y, rows(4, layer.out_channels), x, rows(2, layer.channels), weight


def gradient(layer, choice, grad, y, coefficients, x, scale_shift, weight):
    with tune.use(choice):
        operands = (grad, y, coefficients, x, scale_shift, layer.relu, weight, None, layer.stride, layer.padding)
        return training.gradients(*operands, False, True, None, False, [], [])[1]


def exact(layer, grad, y, coefficients, x, scale_shift, weight):
    """In float64 on the CPU, or by PyTorch's float64 convolutions on a GPU."""
    a, b, constant, mean = coefficients.double()[:, :, None, None]
    scale, shift = scale_shift.double()[:, :, None, None]
    operands = (a * grad + b * (y - mean) + constant, (scale * x + shift).relu(), weight.double(), None)
    geometry = (*map(list, (layer.stride, layer.padding)), [1, 1], False, [0, 0], 1, [False, True, False])
    return torch.ops.aten.convolution_backward(*operands, *geometry)[1].float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, (9, 7), 16, 16), (2, (5, 12), 72, 40), (1, (17, 1), 8, 72)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_tile_gives_exact_integers(gpu, shape, dtype, stride):
    layer, ran = make_layer(*shape, stride, dtype), 0
    operands = integers(gpu, layer)
    expected = exact(layer, *operands)
    for config in (GradientConfig(i, p, s) for i in range(len(tiles())) for p, s in ((32, 1), (100, 1), (32, 2))):
        if plan(layer, config) is None:
            continue
        assert torch.equal(gradient(layer, config, *operands), expected), config
        ran += 1
    assert ran >= 8


@pytest.mark.machine
@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_exact_again_and_again(gpu, stage):
    """Large grids, all candidates of this GPU, ten launches each on fresh memory: what a race would change."""
    batch, size, *channels = stage
    layer = make_layer(batch, (size, size), *channels, torch.bfloat16)
    operands = integers(gpu, layer)
    expected = exact(layer, *operands)
    found = candidates(layer, gpu_of(operands[0].device), most=8)
    assert found
    for config in found:
        for _ in range(10):
            assert torch.equal(gradient(layer, config, *operands), expected), config


@pytest.mark.machine
@pytest.mark.alone
@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_times_beside_cudnn(gpu, stage):
    """Interleaved, in graphs, each verified first: every candidate, Triton's, and cuDNN's between elementwise passes.

    Prints the times; nothing is asserted of them but that each is there: which is faster the tuner asks itself.
    """
    batch, size, *channels = stage
    device = torch.device(gpu, 0)
    layer = make_layer(batch, (size, size), *channels, torch.bfloat16)
    operands = integers(gpu, layer)
    expected = exact(layer, *operands)
    torch.backends.cudnn.benchmark = True
    found = candidates(layer, gpu_of(device), most=6)
    calls = {}
    for choice in [*found, *(c for c in tune.candidates(layer, gpu_of(device)) if c not in found)]:
        calls[str(choice)] = functools.partial(gradient, layer, choice, *operands)
    for name, call in calls.items():
        # The library rounds its result to bfloat16.
        wanted = expected.bfloat16().float() if name == tune.LIBRARY else expected
        assert torch.allclose(call(), wanted, rtol=2.0**-7 if name == tune.LIBRARY else 0, atol=0), name
    seconds, refused = timing.interleaved({name: [call] for name, call in calls.items()}, device)
    times = sorted(seconds.items(), key=lambda pair: pair[1])
    print(f"\n{stage}: {', '.join(f'{name} {s * 1e6:.1f} us' for name, s in times)}")
    assert refused == {}
    assert set(seconds) == set(calls)

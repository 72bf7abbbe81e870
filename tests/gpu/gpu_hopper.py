"""The kernels of Hopper on the GPU they are for: exact integers with every tile, and their times beside cuDNN's."""

import functools

import pytest
import torch
import torch.nn.functional as F

from resnet_fast import ops
from resnet_fast.gpu import convolution as layers
from resnet_fast.gpu import tape, timing, tune
from resnet_fast.gpu.candidates import conv1x1, hopper
from resnet_fast.gpu.layer import Layer, gpu_of

SPLITS = (1, 2, 4)
KINDS = {3: hopper, 1: conv1x1}
# Batch, size, channels, filters, kernel, stride: the stages of a ResNet; expansions, reductions and projections of
# resnet50.
STAGES = [(b, s, c, c, 3, 1) for b in (8, 64) for s, c in ((56, 64), (28, 128), (14, 256), (7, 512))]
STAGES += [(b, s, c, 4 * c, 1, 1) for b in (1, 8, 64) for s, c in ((56, 64), (28, 128), (14, 256), (7, 512))]
STAGES += [(b, s, c, c // 4, 1, 1) for b in (8, 64) for s, c in ((56, 256), (28, 512), (14, 1024), (7, 2048))]
STAGES += [(64, s, c, k, 1, d) for s, c in ((56, 256), (28, 512), (14, 1024)) for k, d in ((c // 2, 1), (2 * c, 2))]


@pytest.fixture(autouse=True)
def on_hopper(gpu):
    if gpu == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"compute capability {torch.cuda.get_device_capability()}: these kernels are for 9.0 alone")


def layer_of(batch, size, channels, filters, dtype, kernel=3, stride=1):
    geometry = ((kernel, kernel), (stride, stride), (kernel // 2, kernel // 2))
    return Layer(batch, *size, channels, filters, *geometry, dtype, "ieee", True, True)


def integers(gpu, batch, size, channels, filters, dtype, kernel=3, stride=1):
    """x, residual and weight of small integers, and the exact result."""
    out = [-(-n // stride) for n in size]
    x, residual = torch.randint(-2, 3, (batch, channels, *size)), torch.randint(-2, 3, (batch, filters, *out))
    weight = torch.randint(-2, 3, (filters, channels, kernel, kernel))
    expected = F.conv2d(x.float(), weight.float(), stride=stride, padding=kernel // 2)
    expected = (expected + residual).relu().to(dtype)
    x, residual = (t.to(gpu, dtype).contiguous(memory_format=torch.channels_last) for t in (x, residual))
    return x, residual, weight.to(gpu, dtype), expected


def check_all(gpu, kind, configs, shape, dtype, kernel, stride):
    x, residual, weight, expected = integers(gpu, *shape, dtype, kernel, stride)
    ran = 0
    for config in configs:
        if kind.plan(layer_of(*shape, dtype, kernel, stride), config) is None:
            continue
        with tune.use(config):
            y = ops.conv_bn_add_relu(x, residual, weight, stride=stride, padding=kernel // 2)
        assert torch.equal(y.cpu(), expected), config
        ran += 1
    assert ran >= 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(3, (7, 7), 64, 72), (2, (13, 11), 32, 40), (5, (2, 3), 48, 64), (2, (14, 14), 256, 16), (1, (5, 54), 64, 136)],
    ids=str,
)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_tile_gives_exact_integers(gpu, shape, dtype, stride):
    configs = [hopper.HopperConfig(i, s) for i in range(len(hopper.tiles())) for s in SPLITS]
    check_all(gpu, hopper, configs, shape, dtype, 3, stride)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, (7, 7), 72, 72), (1, (16, 17), 136, 200), (2, (3, 5), 584, 16)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_1x1_tile_gives_exact_integers(gpu, shape, dtype, stride):
    configs = [conv1x1.Conv1x1Config(i, s) for i in range(len(conv1x1.tiles())) for s in SPLITS]
    check_all(gpu, conv1x1, configs, shape, dtype, 1, stride)


@pytest.mark.machine
@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_exact_again_and_again(gpu, stage):
    """Large grids, all candidates of this GPU, ten launches each on fresh memory: what a race would change."""
    batch, size, *filters, kernel, stride = stage
    shape = (batch, (size, size), *filters, torch.float16, kernel, stride)
    x, residual, weight, expected = integers(gpu, *shape)
    expected = expected.to(gpu)
    found = KINDS[kernel].candidates(layer_of(*shape), gpu_of(x.device), most=8)
    assert found
    for config in found:
        with tune.use(config):
            for _ in range(10):
                y = ops.conv_bn_add_relu(x, residual, weight, stride=stride, padding=kernel // 2)
                assert torch.equal(y, expected), config


@pytest.mark.machine
@pytest.mark.alone
@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_times_beside_cudnn(gpu, stage):
    """Interleaved, in graphs, each verified first: every candidate, the other kernels' and cuDNN's fused convolution.

    Prints the times; nothing is asserted of them but that each is there: which is faster the tuner asks itself.
    """
    batch, size, channels, out_channels, kernel, stride = stage
    device = torch.device(gpu, 0)
    shape = (batch, (size, size), channels, out_channels, torch.float16, kernel, stride)
    layer = layer_of(*shape)
    x, residual, weight, expected = integers(gpu, *shape)
    bias = torch.zeros(out_channels, device=device, dtype=torch.float16)
    filters = weight.contiguous(memory_format=torch.channels_last)
    packed = layers.Filter(
        weight.permute(0, 2, 3, 1).contiguous(),
        torch.ones(out_channels, device=device),
        torch.zeros(out_channels, device=device),
    )
    settings = layer.stride, layer.padding, (1, 1), 1
    calls = {"cuDNN fused": lambda: torch.cudnn_convolution_add_relu(x, filters, residual, 1.0, bias, *settings)}
    found = KINDS[kernel].candidates(layer, gpu_of(device), most=8)
    for choice in [*found, *(c for c in tune.candidates(layer, gpu_of(device)) if c not in found)]:
        calls[str(choice)] = functools.partial(layers.run, layer, choice, x, packed, residual)
    torch.backends.cudnn.benchmark = True
    for name, call in calls.items():
        assert torch.equal(call().cpu(), expected), name
    seconds, refused = timing.interleaved({name: [call] for name, call in calls.items()}, device)
    print(
        f"\n{stage}: "
        + ", ".join(f"{name} {s * 1e6:.1f} us" for name, s in sorted(seconds.items(), key=lambda p: p[1]))
    )
    assert refused == {}
    assert set(seconds) == set(calls)


@torch.no_grad()
def test_a_tape_of_layers_that_share_a_kernel(gpu):
    """Its shared memory is enough for the layer that needs most, whichever was launched last."""
    config = conv1x1.Conv1x1Config(0)
    both = [layer_of(2, (14, 14), c, 64, torch.float16, 1) for c in (1024, 64)]
    large, small = (conv1x1.plan(layer, config).shared for layer in both)
    assert large > small
    cases = [integers(gpu, 2, (14, 14), c, 64, torch.float16, 1) for c in (1024, 64)]
    inputs = [t for x, residual, _, _ in cases for t in (x, residual)]

    scale, shift = torch.ones(64, device=gpu), torch.zeros(64, device=gpu)
    filters = [layers.Filter(weight.permute(0, 2, 3, 1).contiguous(), scale, shift) for _, _, weight, _ in cases]

    def run():
        images = zip(both, filters, inputs[::2], inputs[1::2], strict=True)
        return [layers.run(layer, config, x, own, residual) for layer, own, x, residual in images]

    run()
    outputs, made = tape.record(inputs, run)
    assert isinstance(made, tape.Tape), made
    for found in (outputs, made.run(inputs), run(), made.run(inputs)):
        assert all(torch.equal(y.cpu(), case[3]) for y, case in zip(found, cases, strict=True))

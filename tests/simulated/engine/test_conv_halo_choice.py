"""The 3x3 kernels of Hopper behind the operators: when they are candidates, and the operators' results through them."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from helpers.cuda_support import cuda_device

from resnet_fast import ops
from resnet_fast.gpu import convolution as layers
from resnet_fast.gpu import tune
from resnet_fast.gpu.candidates import hopper as hopper_configs
from resnet_fast.gpu.candidates.hopper import HopperConfig, candidates, computes, plan, tiles
from resnet_fast.gpu.cuda import hopper as hopper_conv
from resnet_fast.gpu.layer import A100, Gpu, Layer

H200 = Gpu(90, 132, 227 * 1024)


def layer_of(n, size, c, k, dtype=torch.float16, kernel=3, stride=1, padding=1):
    pair = lambda v: (v, v)  # noqa: E731
    return Layer(n, size, size, c, k, pair(kernel), pair(stride), pair(padding), dtype, "ieee", True, True)


LAYERS = [layer_of(8, 56, 64, 64), layer_of(8, 28, 128, 128), layer_of(8, 14, 256, 256), layer_of(8, 7, 512, 512)]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_candidates_on_hopper_alone(layer):
    found = candidates(layer, H200)
    assert 1 <= len(found) <= 4
    assert all(plan(layer, c).shared <= H200.shared for c in found)
    for backend in ("auto", "cuda"):
        assert set(found) <= set(tune.candidates(layer, H200, backend))
        assert not any(isinstance(c, HopperConfig) for c in tune.candidates(layer, A100, backend))
    assert not any(isinstance(c, HopperConfig) for c in tune.candidates(layer, H200, "triton"))


@pytest.mark.parametrize("backend", ["auto", "cuda", "triton"])
def test_no_default(backend):
    """What has not been timed runs nowhere unless a measurement says so."""
    for layer in LAYERS:
        assert not isinstance(tune.default(layer, H200, backend), HopperConfig)
        assert not isinstance(tune.candidates(layer, H200, backend)[0], HopperConfig)


@pytest.mark.parametrize(
    "layer",
    [
        layer_of(8, 56, 64, 64, torch.float32),
        layer_of(8, 56, 64, 64, stride=3),
        layer_of(8, 56, 64, 64, kernel=1, padding=0),
        layer_of(8, 56, 64, 64, padding=0),
        layer_of(8, 56, 24, 64),
        layer_of(8, 56, 64, 20),
        layer_of(8, 300, 64, 64),
    ],
    ids=str,
)
def test_what_they_cannot_compute(layer):
    assert candidates(layer, H200) == []
    assert not computes(layer) or all(plan(layer, HopperConfig(i)) is None for i in range(len(tiles())))


def test_a_choice_is_kept(tmp_path):
    """In the file of choices, told apart from other tiles, and read again."""
    layer, file = LAYERS[0], tmp_path / "gpu.json"
    best = candidates(layer, H200)[0]

    def measure(calls):
        return {c: 1.0 if c == best else 2.0 for c in calls}, {}

    assert tune.Tuner(H200, file, measure).choose(layer, lambda: [lambda c: None]) == best
    assert list(json.loads(file.read_text()).values()) == [{"halo": best.halo, "splits": best.splits}]
    assert tune.Tuner(H200, file, None).choose(layer, lambda: []) == best


def operands(n, h, w, c, k, dtype, stride=1):
    g = torch.Generator().manual_seed(0)
    whole = lambda *shape: torch.randint(-2, 3, shape, generator=g).to(dtype)  # noqa: E731
    x, residual = whole(n, c, h, w), whole(n, k, -(-h // stride), -(-w // stride))
    return *(t.contiguous(memory_format=torch.channels_last) for t in (x, residual)), whole(k, c, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [HopperConfig(2), HopperConfig(4, 2)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_operators(config, dtype, stride):
    """Bias, residual and ReLU by the public operators, the kernel that they name, and its split sums."""
    x, residual, weight = operands(2, 6, 5, 32 if config.splits == 1 else 128, 48, dtype, stride)
    bias = torch.randint(-3, 4, (48,)).to(dtype)
    with cuda_device() as device, tune.use(config):
        y = ops.conv_bn_add_relu(x, residual, weight, bias, stride=stride, padding=1)
        z = ops.conv_bn_relu(x, weight, stride=stride, padding=1)
    exact = F.conv2d(x.float(), weight.float(), bias.float(), stride, 1) + residual.float()
    assert torch.equal(y, exact.relu().to(dtype))
    assert torch.equal(z, F.conv2d(x.float(), weight.float(), None, stride, 1).relu().to(dtype))
    assert [name.split("<")[0] for name, _ in device.launches] == ["conv_halo_fwd_kernel"] * 2


def test_slices_that_are_not_aligned():
    x, residual, weight = operands(1, 6, 5, 64, 64, torch.float16)
    wide = torch.zeros(1, 6, 5, 65, dtype=torch.float16)
    wide[..., 1:] = x.permute(0, 2, 3, 1)
    with cuda_device(), tune.use(HopperConfig(5)):
        y = ops.conv_bn_add_relu(wide[..., 1:].permute(0, 3, 1, 2), residual, weight, padding=1)
    assert torch.equal(y, (F.conv2d(x.float(), weight.float(), padding=1) + residual.float()).relu().half())


@pytest.mark.parametrize(("stride", "residual"), [(1, True), (2, False)])
def test_a_measurement_verifies_first(monkeypatch, stride, residual):
    """What computes wrongly is refused before it is timed, and said to be."""
    layer = dataclasses.replace(layer_of(1, 6, 64, 64, stride=stride), residual=residual)
    x, filters, added = layers.operands(layer, torch.device("cpu"))
    hopper_conv.verify.cache_clear()
    with cuda_device() as device:
        layers._run_choice(layer, x, filters, added, HopperConfig(5))
        layers._run_choice(layer, x, filters, added, HopperConfig(5))
        assert len(device.launches) == 3  # verified once

        def wrong(*arguments):
            arguments[-1].fill_(1)

        monkeypatch.setattr(hopper_conv, "conv_bn_relu", wrong)
        with pytest.raises(RuntimeError, match=r"computes .* wrongly"):
            layers._run_choice(layer, x, filters, added, HopperConfig(4))


@pytest.mark.parametrize(
    ("config", "words"),
    [(HopperConfig(99), "tile is 99, want 0 to"), (HopperConfig(0, 0), "splits is 0, want at least 1")],
)
def test_wrong_configurations(config, words):
    with pytest.raises(RuntimeError, match=words):
        hopper_configs.plan(LAYERS[0], config)
    assert plan(LAYERS[0], HopperConfig(0, 2)) is None  # one slice of channels is not split
    with pytest.raises(RuntimeError, match="cannot compute"), cuda_device(), tune.use(HopperConfig(0, 2)):
        ops.conv_bn_relu(torch.ones(1, 64, 4, 4).half(), torch.ones(64, 64, 3, 3).half(), padding=1)

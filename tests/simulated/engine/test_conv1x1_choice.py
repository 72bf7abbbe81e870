"""The 1x1 kernels of Hopper behind the operators: when they are candidates, and the operators' results through them."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from helpers.cuda_support import cuda_device

from resnet_fast import ops
from resnet_fast.gpu import convolution as layers
from resnet_fast.gpu import tune
from resnet_fast.gpu.candidates.conv1x1 import Conv1x1Config, candidates, computes, plan, tiles
from resnet_fast.gpu.cuda import hopper as hopper_conv
from resnet_fast.gpu.layer import A100, Gpu, Layer

H200 = Gpu(90, 132, 227 * 1024)


def layer_of(n, size, c, k, dtype=torch.float16, kernel=1, stride=(1, 1), padding=0, residual=True):
    pair = lambda v: (v, v)  # noqa: E731
    return Layer(n, size, size, c, k, pair(kernel), stride, pair(padding), dtype, "ieee", residual, True)


# Of resnet50: expansions with residual, reductions, projections.
LAYERS = [
    *(layer_of(b, s, c, 4 * c) for b in (1, 8, 128) for s, c in ((56, 64), (28, 128), (14, 256), (7, 512))),
    *(layer_of(b, s, c, c // 4, residual=False) for b in (1, 8, 128) for s, c in ((56, 256), (28, 512), (7, 2048))),
    *(layer_of(b, s, c, 2 * c, stride=(2, 2), residual=False) for b in (1, 64) for s, c in ((56, 256), (14, 1024))),
]


def test_candidates_on_hopper_alone():
    """And never what runs without a measurement, nor what wins a tie."""
    for layer in LAYERS:
        found = candidates(layer, H200)
        assert 1 <= len(found) <= 4
        assert all(plan(layer, c).shared <= H200.shared for c in found)
        for backend in ("auto", "cuda"):
            offered = tune.candidates(layer, H200, backend)
            assert set(found) <= set(offered)
            assert not isinstance(offered[0], Conv1x1Config)
            assert not isinstance(tune.default(layer, H200, backend), Conv1x1Config)
            assert not any(isinstance(c, Conv1x1Config) for c in tune.candidates(layer, A100, backend))
        assert not any(isinstance(c, Conv1x1Config) for c in tune.candidates(layer, H200, "triton"))


def test_the_model_fills_the_machine():
    """Few pixels go to many blocks, many pixels to large tiles; sums are split where blocks are few."""
    layer = layer_of(1, 56, 64, 256)
    assert plan(layer, candidates(layer, H200)[0]).blocks >= 96
    assert candidates(layer_of(1, 7, 2048, 512, residual=False), H200)[0].splits >= 4
    best = candidates(layer_of(128, 56, 256, 64, residual=False), H200)[0]
    assert (tiles()[best.conv1x1].pixels, best.splits) == (256, 1)


@pytest.mark.parametrize(
    "layer",
    [
        layer_of(8, 56, 64, 64, torch.float32),
        layer_of(8, 56, 64, 64, stride=(2, 1)),
        layer_of(8, 56, 64, 64, kernel=3, padding=1),
        layer_of(8, 56, 64, 64, padding=1),
        layer_of(8, 56, 28, 64),
        layer_of(8, 56, 64, 20),
        dataclasses.replace(layer_of(8, 56, 64, 64), role="conv_bn_stats"),
    ],
    ids=str,
)
def test_what_they_cannot_compute(layer):
    assert candidates(layer, H200) == []
    assert not computes(layer) or all(plan(layer, Conv1x1Config(i)) is None for i in range(len(tiles())))


def test_a_choice_is_kept(tmp_path):
    """In the file of choices, told apart from other tiles, and read again."""
    layer, file = LAYERS[0], tmp_path / "gpu.json"
    best = candidates(layer, H200)[0]

    def measure(calls):
        return {c: 1.0 if c == best else 2.0 for c in calls}, {}

    assert tune.Tuner(H200, file, measure).choose(layer, lambda: [lambda c: None]) == best
    assert list(json.loads(file.read_text()).values()) == [{"conv1x1": best.conv1x1, "splits": best.splits}]
    assert tune.Tuner(H200, file, None).choose(layer, lambda: []) == best


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", [Conv1x1Config(0), Conv1x1Config(3, 2)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_operators(config, dtype, stride):
    """Bias, residual and ReLU by the public operators, the kernel that they name, and its split sums; input that is not
    aligned is copied."""
    g = torch.Generator().manual_seed(0)
    whole = lambda *shape: torch.randint(-2, 3, shape, generator=g).to(dtype)  # noqa: E731
    x, residual = whole(2, 6, 5, 129)[..., 1:].permute(0, 3, 1, 2), whole(2, -(-6 // stride), -(-5 // stride), 48)
    residual, weight, bias = residual.permute(0, 3, 1, 2), whole(48, 128, 1, 1), whole(48)
    with cuda_device() as device, tune.use(config):
        y = ops.conv_bn_add_relu(x, residual, weight, bias, stride=stride)
        z = ops.conv_bn(x, weight, stride=stride)
    exact = F.conv2d(x.float(), weight.float(), bias.float(), stride) + residual.float()
    assert torch.equal(y, exact.relu().to(dtype))
    assert torch.equal(z, F.conv2d(x.float(), weight.float(), None, stride).to(dtype))
    assert [name for name, _ in device.launches] == [hopper_conv.kernel_name("conv1x1", dtype, config.conv1x1)] * 2


@pytest.mark.parametrize(("stride", "residual"), [((1, 1), True), ((2, 2), False)])
def test_a_measurement_verifies_first(monkeypatch, stride, residual):
    """What computes wrongly is refused before it is timed, and said to be."""
    layer = layer_of(1, 6, 64, 64, stride=stride, residual=residual)
    x, filters, added = layers.operands(layer, torch.device("cpu"))
    hopper_conv.verify.cache_clear()
    with cuda_device() as device:
        layers._run_choice(layer, x, filters, added, Conv1x1Config(0))
        layers._run_choice(layer, x, filters, added, Conv1x1Config(0))
        assert len(device.launches) == 3  # verified once
        monkeypatch.setattr(hopper_conv, "conv_bn_relu", lambda *arguments: arguments[-1].fill_(1))
        with pytest.raises(RuntimeError, match=r"computes .* wrongly"):
            layers._run_choice(layer, x, filters, added, Conv1x1Config(1))


@pytest.mark.parametrize(
    ("config", "words"),
    [(Conv1x1Config(99), "tile is 99, want 0 to"), (Conv1x1Config(0, 0), "splits is 0, want at least 1")],
)
def test_wrong_configurations(config, words):
    with pytest.raises(RuntimeError, match=words):
        plan(LAYERS[0], config)


def test_wrong_arguments():
    with pytest.raises(RuntimeError, match="conv1x1: args has 1 integers, want 18"):
        torch.ops.resnet_fast.conv1x1_plan(0, [1])
    with pytest.raises(RuntimeError, match="conv1x1: args has -1, want 0 to 4294967295"):
        torch.ops.resnet_fast.conv1x1_plan(0, [-1] * 18)
    with pytest.raises(RuntimeError, match="cannot compute"), cuda_device(), tune.use(Conv1x1Config(0, 2)):
        ops.conv_bn_relu(torch.ones(1, 64, 4, 4).half(), torch.ones(64, 64, 1, 1).half())

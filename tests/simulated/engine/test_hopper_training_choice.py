"""The 3x3 training kernels of Hopper behind the operators: when they are candidates, and results through them."""

import json

import pytest
import torch
import torch.nn.functional as F
from helpers.cuda_support import find_cuda
from helpers.support import channels_last, twins
from helpers.training_support import assert_trains_as_eager
from ptxsim.device import simulated

from resnet_fast import backends, blocks, reference
from resnet_fast.backends.native import extension
from resnet_fast.gpu import tune
from resnet_fast.gpu.candidates.hopper_training import TrainingConfig, candidates, computes, instance, plan, tiles
from resnet_fast.gpu.cuda import hopper_training as hopper
from resnet_fast.gpu.layer import A100, Gpu, Layer

ops = torch.ops.resnet_fast
H200 = Gpu(90, 132, 227 * 1024)
ROLES = ("conv_bn_stats", "data gradient")
SIZES = [(128, 32, 16), (128, 16, 32), (128, 8, 64), (64, 56, 64), (64, 28, 128), (64, 14, 256), (128, 7, 512)]


def layer_of(role, n, size, c, k, dtype=torch.bfloat16, kernel=3, stride=1, padding=1):
    pair = lambda v: (v, v)  # noqa: E731
    return Layer(n, size, size, c, k, pair(kernel), pair(stride), pair(padding), dtype, "ieee", False, True, role)


@pytest.fixture
def device():
    with simulated(find_cuda=find_cuda) as found:
        yield found


@pytest.mark.parametrize("role", ROLES)
def test_candidates_on_hopper_alone(role):
    """For every layer of the networks; what has not been timed is no default, nor first."""
    for n, size, c in SIZES:
        layer = layer_of(role, n, size, c, c)
        found = candidates(layer, H200)
        assert 1 <= len(found) <= 3
        assert all(plan(layer, choice, True).shared <= H200.shared for choice in found)
        among = tune.candidates(layer, H200)
        assert set(found) <= set(among)
        assert not isinstance(among[0], TrainingConfig)
        assert not isinstance(tune.default(layer, H200), TrainingConfig)
        assert not any(isinstance(choice, TrainingConfig) for choice in tune.candidates(layer, A100))
        for choice in found:  # tapes launch by these names
            assert extension.kernel(hopper.kernel_name(role, layer.dtype, instance(layer, choice)))
    assert candidates(layer_of("conv_bn_stats", 128, 32, 16, 32, stride=2), H200)


@pytest.mark.parametrize(
    "layer",
    [
        layer_of("conv_bn_stats", 8, 56, 64, 64, torch.float32),
        layer_of("conv_bn_stats", 8, 56, 64, 64, stride=3),
        layer_of("data gradient", 8, 56, 64, 64, stride=2),
        layer_of("weight gradient", 8, 56, 64, 64),
        layer_of("conv_bn_relu", 8, 56, 64, 64),
        layer_of("conv_bn_stats", 8, 56, 64, 64, kernel=1, padding=0),
        layer_of("data gradient", 8, 56, 64, 64, padding=0),
        layer_of("conv_bn_stats", 8, 56, 24, 64),
        layer_of("data gradient", 8, 56, 64, 24),
        layer_of("conv_bn_stats", 8, 300, 64, 64),
    ],
    ids=str,
)
def test_what_they_cannot_compute(layer):
    assert candidates(layer, H200) == []
    assert not computes(layer) or all(plan(layer, TrainingConfig(i), True) is None for i in range(len(tiles())))


def test_a_choice_is_kept(tmp_path):
    layer, file = layer_of("data gradient", 128, 16, 32, 32), tmp_path / "gpu.json"
    best = candidates(layer, H200)[0]

    def measure(calls):
        return {c: 1.0 if c == best else 2.0 for c in calls}, {}

    assert tune.Tuner(H200, file, measure).choose(layer, lambda: [lambda c: None]) == best
    assert list(json.loads(file.read_text()).values()) == [{"training": best.training}]
    assert tune.Tuner(H200, file, None).choose(layer, lambda: []) == best


def whole(*shape, most=2):
    return channels_last(torch.randint(-most, most + 1, shape).half())


def test_operators(device):
    """Statistics and sums through the kernels that finalise them, images that are not aligned, and the launches."""
    x = whole(1, 3 * 5 * 6 * 32 + 1, 1, 1).flatten()[1:].view(3, 5, 6, 32).permute(0, 3, 1, 2)
    weight, bias = whole(24, 32, 3, 3, most=1), torch.randint(-3, 4, (24,)).float()
    scale_shift = torch.randint(-1, 2, (2, 32)).float()
    activation = (x.double() * scale_shift[0, :, None, None] + scale_shift[1, :, None, None]).relu()
    settings = ([1, 1], [1, 1], 0)
    with tune.use(TrainingConfig(3)):
        y, stats = ops.conv_bn_stats(x, scale_shift, True, weight, bias, *settings, True)
        unnormed, none = ops.conv_bn_stats(x, None, False, weight, None, *settings, False)
    exact = F.conv2d(activation, weight.double(), bias.double(), 1, 1)
    assert torch.equal(y.double(), exact)
    assert torch.equal(unnormed.double(), F.conv2d(x.double(), weight.double(), None, 1, 1))
    assert none.shape == (2, 0)
    var, mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    assert torch.allclose(stats.double(), torch.stack((mean, var)), rtol=1e-6, atol=1e-6)

    weight, grad, residual = whole(32, 32, 3, 3, most=1), whole(3, 32, 5, 6), whole(3, 32, 5, 6)
    with tune.use(TrainingConfig(3)):
        dx, _, sums = ops.conv_backward(
            *(grad, None, None, x, scale_shift, True, weight, *settings, True, False, residual, True, [x]),
            [torch.ones(2, 32)],
        )
    expected = F.conv_transpose2d(grad.double(), weight.double(), None, 1, 1) + residual
    expected = torch.where(activation > 0, expected, 0)
    assert torch.equal(dx.double(), expected)
    terms = torch.stack((expected, expected * (x - 1))).sum((1, 3, 4))
    assert torch.equal(sums[:2].double(), terms)
    names = [name.split("<")[0] for name, _ in device.launches if "halo" in name]
    assert names == ["conv_halo_stats_kernel"] * 2 + ["conv_halo_gradient_kernel"]


def test_a_block_trains(device):
    fast, eager = (m.bfloat16() for m in twins(blocks.BasicBlock, reference.BasicBlock, 16, 16))
    x = torch.randn(2, 16, 6, 7).bfloat16()
    with torch.no_grad():
        grad = torch.randn_like(eager(x))
    with tune.use(TrainingConfig(3)):
        assert_trains_as_eager(fast, eager, x, grad, factor=2, backend="triton")
    names = {name.split("<")[0] for name, _ in device.launches}
    assert names >= {"conv_halo_stats_kernel", "conv_halo_gradient_kernel"}
    assert not names & {"_conv_bn_stats_kernel", "_data_gradient_kernel"}
    assert backends.fallbacks() == {}


@pytest.mark.parametrize("role", ROLES)
def test_a_measurement_verifies_first(device, monkeypatch, role):
    """What computes wrongly is refused before it is timed, and said to be: the result, or the sums alone."""
    layer = layer_of(role, 3, 6, 16, 32 if role == "conv_bn_stats" else 16, torch.float16)
    hopper.verify(layer, TrainingConfig(3), torch.device("cpu"))
    kernel = getattr(hopper, role.replace(" ", "_"))

    def broken(where):
        def run(*arguments):
            partial = kernel(*arguments)
            parts = partial if isinstance(partial, torch.Tensor) else partial.partial
            images = [t for t in arguments if isinstance(t, torch.Tensor)]
            (parts if where == "sums" else images[-1]).add_(3)
            return partial

        return run

    for number, where in enumerate(("sums", "result")):
        monkeypatch.setattr(hopper, role.replace(" ", "_"), broken(where))
        hopper.verify.cache_clear()
        with pytest.raises(RuntimeError, match=r"computes .* wrongly"):
            hopper.verify(layer, TrainingConfig(3 - number), torch.device("cpu"))


def test_wrong_configurations(device):
    with pytest.raises(RuntimeError, match="tile is 99, want 0 to"):
        plan(layer_of("conv_bn_stats", 8, 56, 64, 64), TrainingConfig(99), True)
    x, weight = whole(1, 16, 4, 4), whole(16, 16, 3, 3)
    with tune.use(TrainingConfig(4)), pytest.raises(RuntimeError, match="cannot compute"):  # slices of 64 channels
        ops.conv_bn_stats(x, None, False, weight, None, [1, 1], [1, 1], 0, False)
    assert not device.launches

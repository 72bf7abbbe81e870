"""The weight gradient of Hopper behind the operators: when it is a candidate, and the operators' results through it."""

import dataclasses
import json

import pytest
import torch
from helpers.cuda_support import cuda_device
from helpers.support import channels_last

from resnet_fast import ops as package_ops
from resnet_fast.gpu import training_operators, tune
from resnet_fast.gpu.candidates import weight_gradient as gradient_configs
from resnet_fast.gpu.candidates.weight_gradient import GradientConfig, candidates, computes, plan, tiles
from resnet_fast.gpu.cuda import weight_gradient as hopper
from resnet_fast.gpu.layer import A100, Gpu, Layer

ops = torch.ops.resnet_fast
H200 = Gpu(90, 132, 227 * 1024)


def layer_of(n, size, c, k, stride=1, dtype=torch.bfloat16, kernel=3, padding=1, role="weight gradient"):
    pair = lambda v: (v, v)  # noqa: E731
    return Layer(n, size, size, c, k, pair(kernel), pair(stride), pair(padding), dtype, "ieee", False, True, role)


# Those of cifar_resnet32 and of resnet18 at batch 128.
LAYERS = [
    *(layer_of(128, s, c, c) for s, c in ((32, 16), (16, 32), (8, 64), (56, 64), (28, 128), (14, 256), (7, 512))),
    *(layer_of(128, s, c, 2 * c, 2) for s, c in ((32, 16), (16, 32), (56, 64), (28, 128), (14, 256))),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_candidates_on_hopper_alone(layer):
    found = candidates(layer, H200)
    assert len(found) == 3
    for config in found:
        made = plan(layer, config)
        assert made.shared <= H200.shared
        # No more rounds than two, and multiprocessors idle in none of one round but a few.
        assert 100 <= made.blocks * config.splits <= 2 * 132
    assert set(found) <= set(tune.candidates(layer, H200, "auto"))
    assert not any(isinstance(c, GradientConfig) for c in tune.candidates(layer, H200, "triton"))
    assert not any(isinstance(c, GradientConfig) for c in tune.candidates(layer, A100, "auto"))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_no_default(layer):
    """What has not been timed runs nowhere unless a measurement says so."""
    assert not isinstance(tune.default(layer, H200), GradientConfig)
    assert not isinstance(tune.candidates(layer, H200)[0], GradientConfig)


@pytest.mark.parametrize(
    "layer",
    [
        layer_of(8, 56, 64, 64, dtype=torch.float32),
        layer_of(8, 56, 64, 64, stride=3),
        layer_of(8, 56, 64, 64, kernel=1, padding=0),
        layer_of(8, 56, 64, 64, padding=0),
        layer_of(8, 56, 64, 64, role="data gradient"),
        layer_of(8, 56, 3, 64),
        layer_of(8, 56, 64, 20),
        layer_of(8, 3000, 64, 64),
    ],
    ids=str,
)
def test_what_they_cannot_compute(layer):
    assert candidates(layer, H200) == []
    assert not computes(layer) or all(plan(layer, GradientConfig(i, 128, 1)) is None for i in range(len(tiles())))


def test_positions_of_a_tile():
    """Groups are whole and even, no position is lost, and division by multiplication is exact where it is used."""
    for layer in LAYERS:
        for config in candidates(layer, H200):
            a = dict(zip(_FIELDS.split(), plan(layer, config).args, strict=True))
            tile = tiles()[config.gradient]
            assert a["margin"] == a["shift"] * {64: 0, 32: 1, 16: 2}[tile.rows]
            assert a["positions"] + a["margin"] == a["groups"] * 16 * tile.steps * tile.parts
            assert a["groups"] % 2 == 0
            lines = layer.batch * (a["out_height"] + 1)
            assert a["tiles"] * a["positions"] >= lines * a["pitch"] > (a["tiles"] - 1) * a["positions"]
            for inverse, by, most in (
                (a["pitch_inverse"], a["pitch"], a["positions"] + 4 * a["pitch"]),
                (a["height_inverse"], a["out_height"] + 1, lines + a["positions"]),
            ):
                numbers = torch.arange(most)
                assert torch.equal(numbers * inverse >> 32, numbers // by)


_FIELDS = (
    "batch height width channels out_channels stride affine relu batch_norm positions splits out_height out_width "
)
_FIELDS += (
    "pitch tiles shift groups column_blocks margin halo run row_plane column_plane y_at x_at stage pitch_inverse "
)
_FIELDS += "height_inverse"


def test_a_choice_is_kept(tmp_path):
    """In the file of choices, told apart from other kernels' tiles, and read again."""
    layer, file = LAYERS[0], tmp_path / "gpu.json"
    best = candidates(layer, H200)[1]

    def measure(calls):
        return {c: 1.0 if c == best else 2.0 for c in calls}, {}

    assert tune.Tuner(H200, file, measure).choose(layer, lambda: [lambda c: None]) == best
    assert list(json.loads(file.read_text()).values()) == [dataclasses.asdict(best)]
    assert tune.Tuner(H200, file, None).choose(layer, lambda: []) == best


def operands(c, k, stride, dtype):
    whole = lambda *shape: torch.randint(-2, 3, shape)  # noqa: E731
    x = channels_last(whole(2, c, 6, 7).to(dtype))
    grad, y = (channels_last(whole(2, k, -(-6 // stride), -(-7 // stride)).to(dtype)) for _ in range(2))
    return grad, y, whole(4, k).float().clamp(-1, 1), x, whole(2, c).float().clamp(-1, 1)


def exact(grad, y, coefficients, x, scale_shift, weight, stride):
    a, b, constant, mean = coefficients.double()[:, :, None, None]
    scale, shift = scale_shift.double()[:, :, None, None]
    dy, activation = a * grad + b * (y - mean) + constant, (scale * x + shift).relu()
    geometry = ([stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
    return torch.ops.aten.convolution_backward(dy, activation, weight.double(), None, *geometry)[:2]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("stride", "dtype"), [(1, torch.float16), (2, torch.bfloat16)])
def test_operator(stride, dtype, layout):
    """Of float32 weights in both layouts: the kernel and the reduction that the operator launches, and their result."""
    grad, y, coefficients, x, scale_shift = operands(32, 40, stride, dtype)
    weight = torch.randint(-1, 2, (40, 32, 3, 3)).float().contiguous(memory_format=layout)
    settings = (True, weight, [stride] * 2, [1, 1], 0, False, True, None, False, [], [])
    with cuda_device() as device, tune.use(GradientConfig(2, 32, 2 // stride)):
        _, dw, _ = ops.conv_backward(grad, y, coefficients, x, scale_shift, *settings)
    assert torch.equal(dw.double(), exact(grad, y, coefficients, x, scale_shift, weight, stride)[1])
    assert dw.dtype == weight.dtype
    assert dw.stride() == weight.stride()
    names = [name.split("<")[0] for name, _ in device.launches]
    assert names[-2:] == ["weight_gradient_kernel", "_reduce_split_k_kernel"]


def test_the_gradient_that_the_library_wants_is_used_here_too(monkeypatch):
    """Where dy is made for another kernel, it is read instead of grad and y."""
    grad, y, coefficients, x, scale_shift = operands(32, 32, 1, torch.float16)
    weight = torch.randint(-1, 2, (32, 32, 3, 3)).half()
    choices = {"data gradient": tune.LIBRARY, "weight gradient": GradientConfig(2, 64, 1)}
    monkeypatch.setattr(tune.Tuner, "choose", lambda self, layer, trials, backend="auto": choices[layer.role])
    settings = (True, weight, [1, 1], [1, 1], 0, True, True, None, False, [], [])
    with cuda_device() as device:
        dx, dw, _ = ops.conv_backward(grad, y, coefficients, x, scale_shift, *settings)
    expected = exact(grad, y, coefficients, x, scale_shift, weight, 1)
    assert torch.equal(dx, expected[0].half())
    assert torch.equal(dw, expected[1].half())
    ((_, report),) = ((name, r) for name, r in device.launches if name.startswith("weight_gradient_kernel"))
    assert "arg1" not in report.buffers  # y


def test_slices_that_are_not_aligned():
    grad, y, coefficients, x, scale_shift = operands(16, 16, 1, torch.float16)
    wide = torch.zeros(x.numel() + 1, dtype=torch.float16)
    wide[1:] = x.permute(0, 2, 3, 1).flatten()
    shifted = wide[1:].view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
    layer = Layer(2, 6, 7, 16, 16, (3, 3), (1, 1), (1, 1), torch.float16, "ieee", False, True, "weight gradient")
    dw = torch.empty(16, 16, 3, 3)
    with cuda_device():
        hopper.weight_gradient(layer, GradientConfig(4, 32, 1), grad, y, coefficients, shifted, scale_shift, dw)
    assert torch.equal(dw.double(), exact(grad, y, coefficients, x, scale_shift, dw, 1)[1])


@pytest.mark.parametrize("stride", [1, 2])
def test_a_measurement_verifies_first(monkeypatch, stride):
    """What computes wrongly is refused before it is timed, and said to be."""
    grad, y, coefficients, x, scale_shift = operands(32, 32, stride, torch.bfloat16)
    config, tried = GradientConfig(2, 64, 1), []

    def choose(self, layer, trials, backend="auto"):
        for run in (*trials(), *trials()):
            tried.append(run(config))
        return config

    monkeypatch.setattr(tune.Tuner, "choose", choose)
    hopper.verify.cache_clear()
    arguments = (grad, y, coefficients, x, scale_shift, True, torch.zeros(32, 32, 3, 3), None, [stride] * 2, [1, 1])
    with cuda_device() as device:
        training_operators.gradients(*arguments, False, True, None, False, [], [])
        names = [name for name, _ in device.launches if name.startswith("weight_gradient_kernel")]
        assert len(names) == 1 + 2 + 1  # verified once, tried twice, run
        hopper.verify.cache_clear()
        monkeypatch.setattr(hopper, "weight_gradient", lambda *arguments: arguments[-1].fill_(1))
        with pytest.raises(RuntimeError, match=r"computes .* wrongly"):
            training_operators.gradients(*arguments, False, True, None, False, [], [])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (GradientConfig(99, 128, 1), "tile is 99, want 0 to 4"),
        (GradientConfig(0, 128, 0), "splits is 0, want at least 1"),
        (GradientConfig(0, 0, 1), "positions is 0, want at least 1"),
    ],
)
def test_wrong_configurations(config, words):
    with pytest.raises(RuntimeError, match=words):
        gradient_configs.plan(LAYERS[0], config)
    assert plan(LAYERS[0], GradientConfig(0, 4096, 1)) is None  # shared memory
    assert plan(layer_of(1, 4, 16, 16), GradientConfig(0, 128, 2)) is None  # one tile is not split
    words = r"conv_bn_relu: wgmma gradient .* is a kernel of training"
    with pytest.raises(RuntimeError, match=words), cuda_device(), tune.use(GradientConfig(0, 128, 1)):
        package_ops.conv_bn_relu(torch.ones(1, 16, 4, 4).half(), torch.ones(16, 16, 3, 3).half(), padding=1)
    with pytest.raises(RuntimeError, match=r"weight_gradient: wgmma gradient 16x16 of 32 split 1 cannot compute"):
        hopper.weight_gradient(LAYERS[-1], GradientConfig(4, 32, 1), *[torch.zeros(1)] * 6)

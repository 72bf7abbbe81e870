"""The stage kernels in CUDA C++: compiled for sm_80, executed in the simulator behind the package's own launches."""

import pytest
import torch
from helpers.stage_support import EagerStage, FastStage, add_kernels, assert_rule, input_of
from helpers.support import EAGER_LAYOUTS, assert_error_rule, computing, eager_results, twins

from resnet_fast import backends
from resnet_fast.gpu import residual_network
from resnet_fast.gpu.residual_network import kernels

KERNELS = [pytest.param(k, dtype, id=k.name(dtype)) for k in kernels() for dtype in k.dtypes()]
# Of 16 bits, one image a block.
CIFAR = {
    (k.entry, k.channels): k for k in kernels() if k.itemsize == 2 and k.images == 1 and k.channels * k.size == 512
}


@pytest.fixture
def device(simulated_device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    add_kernels(simulated_device)
    return simulated_device


@pytest.fixture
def insist(monkeypatch):
    """Makes the launcher take one kernel, whatever the number of images."""

    def choose(kernel):
        monkeypatch.setattr(residual_network, "_choose", lambda *_: kernels().index(kernel))

    return choose


def run(device, network, x):
    """The result and the report of the one launch that it took."""
    before = len(computing(device))
    with torch.no_grad():
        y = network(x)
    ((name, report),) = computing(device)[before:]
    assert name.startswith("residual_stage_")
    return y, report


def stage(kernel, blocks, dtype):
    fast, eager = twins(FastStage, EagerStage, kernel.entry, kernel.channels, blocks)
    return fast.to(dtype), eager.to(dtype)


def test_there_are_kernels():
    """The networks of the CIFAR family, and those of twice the width behind their first stage."""
    have = {(k.itemsize, k.entry, k.channels, k.size) for k in kernels()}
    for itemsize in (2, 4):
        assert {(itemsize, *s) for s in (("stem", 16, 32), ("strided", 32, 16), ("strided", 64, 8))} <= have
    assert {(2, *s) for s in (("map", 32, 32), ("strided", 64, 16), ("strided", 128, 8))} <= have
    assert {k.images for k in kernels() if k.channels == 64 and k.size == 8} == {1, 2, 4}


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
def test_values(device, insist, kernel, dtype):
    """Each kernel, with all its images and with one missing: within the error rule, every byte written, nothing read
    that was not. (The simulator raises for the rest, and for races and accesses out of bounds.)"""
    insist(kernel)
    for batch, blocks in ((kernel.images, 2), (2 * kernel.images - 1, 1)) if kernel.images > 1 else ((2, 2),):
        fast, eager = stage(kernel, blocks, dtype)
        x = input_of(kernel, batch, dtype)
        y, _ = run(device, fast, x)
        assert_rule(y, eager, x)
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert backends.fallbacks() == {}


@pytest.mark.parametrize(("batch", "blocks"), [(1, 1), (5, 2), (1, 9)])
def test_counts(device, batch, blocks):
    for entry in (("stem", 16), ("strided", 32), ("map", 64)):
        kernel = CIFAR[entry]
        fast, eager = stage(kernel, blocks, torch.float16)
        x = input_of(kernel, batch, torch.float16, torch.contiguous_format)
        y, report = run(device, fast, x)
        assert_rule(y, eager, x)
        assert sum(report.mma_flops.values()) >= 2 * y.numel() * kernel.channels * 9 * (2 * blocks - 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", EAGER_LAYOUTS, ids=str)
def test_images(device, layout, dtype):
    """Images of either layout, and ones that do not begin at a multiple of 16 bytes, give the same bits."""
    fast, eager = stage(CIFAR["stem", 16], 1, dtype)
    x = input_of(CIFAR["stem", 16], 2, dtype, layout)
    y, _ = run(device, fast, x)
    assert_rule(y, eager, x)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].as_strided(x.shape, x.stride()).copy_(x)
    sliced = torch.stack([x, x], 2)[:, :, 0]
    for same in (shifted, sliced):
        assert torch.equal(run(device, fast, same)[0], y)


def make_integers(model):
    """Filters of few ones; batch norms that change signs and add small integers."""
    generator = torch.Generator().manual_seed(1)

    def integers(low, high, shape):
        return torch.randint(low, high, shape, generator=generator)

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            few = torch.rand(module.weight.shape, generator=generator) < 1 / 32
            module.weight.data.copy_(integers(-1, 2, few.shape) * few)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 0.25
            module.running_var.fill_(0.75)
            module.weight.data.copy_(integers(0, 2, module.weight.shape) * 2 - 1)
            module.running_mean.copy_(integers(-2, 3, module.weight.shape))
            module.bias.data.copy_(integers(-2, 3, module.bias.shape))


def test_integers(device):
    """Sums of small integers are exact: the result is float64's, to the bit."""
    for kernel, dtype in ((k, dtype) for k in CIFAR.values() for dtype in (torch.float16, torch.float32)):
        fast, eager = stage(kernel, 2, dtype)
        make_integers(fast)
        make_integers(eager)
        x = torch.randint(-2, 3, input_of(kernel, 2, dtype).shape).to(dtype)
        y, _ = run(device, fast, x)
        exact, _ = eager_results(eager, x)
        assert 8 < exact.abs().max() < 2048  # up to there float16 and TF32 have all integers
        assert torch.equal(y.double(), exact)


def test_infinities_and_nans(device):
    """They reach the pixels that eager's reach, and no other: no tap reads a neighbour row, column or image."""
    for kernel, dtype in ((k, dtype) for k in CIFAR.values() for dtype in (torch.float16, torch.float32)):
        fast, eager = stage(kernel, 1, dtype)
        x = input_of(kernel, 2, dtype, torch.contiguous_format)
        size, (clean, _) = x.shape[-1], run(device, fast, x)
        for row, column, value in ((0, 0, torch.nan), (size - 1, size - 1, torch.inf), (5, 0, -torch.inf)):
            spoiled = x.clone()
            spoiled[1, 1, row, column] = value
            y, _ = run(device, fast, spoiled)
            with torch.no_grad():
                expected = eager(spoiled)
            assert torch.equal(y.isnan(), expected.isnan())
            assert torch.equal(y.isinf(), expected.isinf())
            assert torch.equal(y[0], clean[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", CIFAR.values(), ids=lambda k: k.name(torch.bfloat16))
def test_repeatable(device, kernel, dtype):
    """The order in which the simulator lets warps run does not matter, to the bit."""
    fast, _ = stage(kernel, 2, dtype)
    x = input_of(kernel, 2, dtype)
    results = []
    for seed in (0, 11, 222):
        device.seed = seed
        results.append(run(device, fast, x)[0])
    assert all(torch.equal(y, results[0]) for y in results)


def test_images_a_block_do_not_matter(device, insist):
    """Every kernel adds in the same order: how many images there are does not change an image's bits."""
    for entry in ("map", "strided"):
        results = []
        for kernel in (k for k in kernels() if k[:4] == (entry, 2, 64, 8)):
            insist(kernel)
            torch.manual_seed(0)
            fast, _ = stage(kernel, 2, torch.float16)
            results.append(run(device, fast, input_of(kernel, 5, torch.float16))[0])
        assert len(results) == 3
        assert all(torch.equal(y, results[0]) for y in results)


def test_choice_of_kernel():
    """One image a block until every multiprocessor has one."""
    (stage_,) = residual_network.stages(_identity_block(64), (64, 8, 8), torch.float16)
    images = [
        kernels()[residual_network._choose(stage_, torch.float16, n, 108)].images
        for n in (1, 108, 109, 216, 217, 10_000)
    ]
    assert images == [1, 1, 2, 2, 4, 4]


def _identity_block(channels):
    return [0, -1, 1, channels, 3, 3, 1, 1, 1, 1, 1, 0, 1, channels, 3, 3, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("change", "shape", "dtype"),
    [
        ({}, (16, 16, 16), torch.float16),  # no kernel for the size
        ({}, (16, 32, 30), torch.float16),
        ({}, (16, 32, 32), torch.float64),
        ({2: 0}, (16, 32, 32), torch.float16),  # no ReLU
        ({11: -1}, (16, 32, 32), torch.float16),  # no residual
        ({6: 2}, (16, 32, 32), torch.float16),  # a stride without a projection
        ({8: 0}, (16, 32, 32), torch.float16),  # no padding
        ({10: 0}, (16, 32, 32), torch.float16),  # the second convolution reads the input
    ],
)
def test_other_chains(change, shape, dtype):
    layers = _identity_block(16)
    assert residual_network.stages(layers, (16, 32, 32), torch.float16) is not None
    for field, value in change.items():
        layers[field] = value
    assert residual_network.stages(layers, shape, dtype) is None


def test_other_shapes_run_layer_by_layer(device):
    fast, eager = stage(CIFAR["map", 64], 1, torch.float16)
    x = torch.randn(2, 64, 8, 9).half()
    with torch.no_grad():
        y = fast(x)
    assert [name for name, _ in computing(device)] == ["_conv_bn_relu_fwd_kernel"] * 2
    assert_rule(y, eager, x)


def test_named_backends(device):
    fast, _ = stage(CIFAR["map", 64], 1, torch.float16)
    x = input_of(CIFAR["map", 64], 2, torch.float16)
    for backend, kernels_ in (
        ("cuda", [CIFAR["map", 64].name(torch.float16)]),
        ("triton", ["_conv_bn_relu_fwd_kernel"] * 2),
    ):
        device.launches.clear()
        with torch.no_grad(), backends.use(backend):
            fast(x)
        assert [name for name, _ in computing(device)] == kernels_


def test_exact_float32_runs_layer_by_layer(device, monkeypatch):
    """The stage kernels multiply float32 as TF32: where that is not allowed they are not used."""
    fast, eager = stage(CIFAR["map", 64], 1, torch.float32)
    x = input_of(CIFAR["map", 64], 1, torch.float32)
    run(device, fast, x)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    device.launches.clear()
    with torch.no_grad():
        y = fast(x)
    assert not any("residual_stage" in name for name, _ in device.launches)
    exact, results = eager_results(eager, x)
    assert_error_rule(y, exact, results)


def test_empty_batch(device):
    fast, _ = stage(CIFAR["map", 64], 1, torch.float16)
    with torch.no_grad():
        assert fast(torch.empty(0, 64, 8, 8).half()).shape == (0, 64, 8, 8)
    assert computing(device) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": (2, 64, 8)}, r"x has 3 dimensions, want 4"),
        ({"x": (2, 64, 9, 9)}, r"layers and x of \(2, 64, 9, 9\), torch\.float16, are no chain of stages"),
        ({"packed": (7,)}, r"packed has 7 floats, want \d+"),
        ({"classes": -1}, r"classes is -1, want 0 or more"),
    ],
)
def test_wrong_arguments(device, arguments, message):
    layers = _identity_block(64)
    (found,) = residual_network.stages(layers, (64, 8, 8), torch.float16)
    x = torch.zeros(arguments.get("x", (2, 64, 8, 8)), dtype=torch.float16)
    packed = torch.zeros(arguments.get("packed", (found.floats(torch.float16),)))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.resnet_fast.residual_network(x, packed, layers, arguments.get("classes", 0))

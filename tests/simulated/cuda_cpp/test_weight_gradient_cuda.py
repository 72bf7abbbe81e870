"""The weight gradient of 3x3 convolutions on Hopper, compiled for sm_90a and executed in the simulator."""

import dataclasses

import pytest
import torch
from helpers.cuda_support import cuda_device, find_cuda
from helpers.support import assert_error_rule
from ptxsim import Kernel
from ptxsim.compilers import compile_cuda
from ptxsim.tests.test_faults import survivors

from resnet_fast.gpu.candidates.weight_gradient import GradientConfig, plan, tiles
from resnet_fast.gpu.cuda import weight_gradient as hopper
from resnet_fast.gpu.layer import layer_of

DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture
def device():
    with cuda_device() as found:
        yield found


def make_layer(n, c, h, w, k, stride=1, dtype=torch.float16, relu=True):
    role = "weight gradient"
    return layer_of((n, c, h, w), (k, 3, 3), (stride,) * 2, (1, 1), dtype, residual=False, relu=relu, role=role)


def whole(most, *shape):
    return torch.randint(-most, most + 1, shape).float()


def normal(most, *shape):
    return torch.randn(shape)


def operands(layer, draw, batch_norm=True, affine=True):
    """grad, y, coefficients, x, scale_shift: small integers or normal numbers."""

    def image(channels, height, width):
        return draw(2, layer.batch, height, width, channels).to(layer.dtype).permute(0, 3, 1, 2)

    grad, y = (image(layer.out_channels, layer.out_height, layer.out_width) for _ in range(2))
    coefficients, scale_shift = draw(1, 4, layer.out_channels), draw(1, 2, layer.channels)
    x = image(layer.channels, layer.height, layer.width)
    return grad, *((y, coefficients) if batch_norm else (None, None)), x, scale_shift if affine else None


def formed(layer, grad, y, coefficients, x, scale_shift, wide=torch.float64, store=torch.float64):
    """dy and the activation, computed in ``wide`` and stored in ``store``."""
    dy, activation = grad.to(wide), x.to(wide)
    if coefficients is not None:
        a, b, constant, mean = coefficients.to(wide)[:, :, None, None]
        dy = a * dy + b * (y.to(wide) - mean) + constant
    if scale_shift is not None:
        scale, shift = scale_shift.to(wide)[:, :, None, None]
        activation = scale * activation + shift
    return dy.to(store).to(wide), (activation.relu() if layer.relu else activation).to(store).to(wide)


def reference(layer, dy, activation):
    weight = torch.zeros(layer.out_channels, layer.channels, 3, 3, dtype=dy.dtype)
    geometry = ([*layer.stride], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
    return torch.ops.aten.convolution_backward(dy, activation, weight, None, *geometry)[1]


def run(layer, config, given, dtype=torch.float32):
    dw = torch.empty(layer.out_channels, layer.channels, 3, 3, dtype=dtype)
    hopper.weight_gradient(layer, config, *given, dw)
    return dw


def check(layer, config, **kinds):
    """Small integers: operands and sums are exact, so any order of addition gives the same bits."""
    given = operands(layer, whole, **kinds)
    assert torch.equal(run(layer, config, given).double(), reference(layer, *formed(layer, *given)))


# Batch, channels in, height, width, channels out: tiles that end within lines, images and between them; channels that
# fill no tile and several; an image of one pixel, of one column.
SHAPES = [
    (3, 16, 9, 7, 16),
    (2, 72, 5, 12, 40),
    (1, 32, 1, 1, 8),
    (2, 8, 17, 1, 72),
    (1, 24, 3, 40, 24),
]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("tile", range(len(tiles())))
def test_exact_on_integers(device, tile, stride):
    if tiles()[tile].rows == 16 and stride == 2:
        assert plan(make_layer(*SHAPES[0], 2), GradientConfig(tile, 32, 1)) is None
        return
    for shape in SHAPES:
        layer = make_layer(*shape, stride)
        for positions, splits in ((32, 1), (100, 1), (32, 3)):
            config = GradientConfig(tile, positions, splits)
            if plan(layer, config) is None:
                # Fewer tiles than splits, or four runs of x that do not fit shared memory.
                assert splits > 1 or (stride, positions) == (2, 100)
                continue
            check(layer, config)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_prologues(device, batch_norm, affine, relu):
    for tile in (0, 2):
        layer = make_layer(2, 40, 6, 9, 24, dtype=torch.bfloat16, relu=relu)
        check(layer, GradientConfig(tile, 64, 2), batch_norm=batch_norm, affine=affine)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_of_float32(device, dtype):
    """Products are exact, and of 126 of them no order of addition loses more."""
    layer, config = make_layer(2, 32, 9, 7, 32, dtype=dtype, relu=False), GradientConfig(2, 32, 2)
    given = operands(layer, normal, batch_norm=False, affine=False)
    found, (dy, activation) = run(layer, config, given), formed(layer, *given)
    bound = 126 * 2.0**-24 * reference(layer, dy.abs(), activation.abs())
    assert ((found - reference(layer, dy, activation)).abs() <= bound).all()
    assert torch.equal(run(layer, config, given, dtype), found.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_are_rounded_once(device, dtype):
    """Against eager PyTorch, which stores dy and the activation; y has a mean that would cancel in 16 bits."""
    layer, config = make_layer(2, 32, 9, 7, 32, dtype=dtype), GradientConfig(2, 32, 2)
    grad, y, coefficients, x, scale_shift = operands(layer, normal)
    coefficients[3] += 30
    given = (grad, (y + 30).to(dtype), coefficients, x, scale_shift)
    eager = reference(layer, *formed(layer, *given, torch.float32, dtype)).to(dtype)
    assert_error_rule(run(layer, config, given, dtype), reference(layer, *formed(layer, *given)), [eager])


def test_the_order_of_blocks_is_no_matter():
    layer, config = make_layer(3, 16, 9, 7, 16), GradientConfig(4, 32, 2)
    layer = dataclasses.replace(layer, batch=6)
    given, results = operands(layer, normal), []
    for seed in (0, 1000):
        with cuda_device(seed=seed):
            results.append(run(layer, config, given))
    assert torch.equal(*results)


def test_what_is_not_finite_stays_in_its_channels(device):
    layer = make_layer(1, 16, 5, 6, 16, relu=False)
    grad, *_, x, _ = operands(layer, whole, batch_norm=False, affine=False)
    x[0, 3, 2, 2], grad[0, 5, 4, 4] = float("nan"), float("inf")
    found = run(layer, GradientConfig(4, 32, 1), (grad, None, None, x, None))
    finite = torch.ones(16, 16, dtype=torch.bool)
    finite[:, 3] = finite[5] = False
    assert torch.equal(found.isfinite().all(-1).all(-1), finite)


@pytest.mark.parametrize("tile", range(len(tiles())))
def test_traffic(device, tile):
    """Whole sectors; vectors of shared memory without bank conflicts; of memory each byte, and no other."""
    layer = make_layer(1, tiles()[tile].columns, 8, 14, tiles()[tile].rows)
    run(layer, GradientConfig(tile, 32, 1), operands(layer, whole))
    report = device.launches[0][1]
    assert [r.text for r in report.conflicts() if "v4" in r.text or r.kind == "matrix"] == []
    touched, least = report.sectors
    assert touched == least
    for name, channels in (("arg0", layer.out_channels), ("arg1", layer.out_channels), ("arg3", layer.channels)):
        assert report.buffers[name]["read"] == 2 * channels * 8 * 14
    assert report.mma_flops.keys() == {f"m64n{layer.channels}k16"}


def test_every_statement_that_orders_is_needed():
    """Several tiles a block: without a wait, barrier or fence there is a fault or a wrong result.

    But the two waits for fragments, with the commit that the first counts: to the simulator the next fragments have
    other registers, which ptxas may give the same place."""
    layer, config = make_layer(2, 16, 9, 7, 16), GradientConfig(2, 32, 1)
    given = operands(layer, whole)
    expected = reference(layer, *formed(layer, *given))
    source, flags, _ = find_cuda("weight_gradient_kernel<float16, 2>")
    ptx, made = compile_cuda(source, *flags), plan(layer, config)
    name = Kernel(ptx).name

    def passes(kernel):
        partial = torch.empty(1, 16, 3, 3, 16)
        arguments = (*given, partial, torch.tensor(made.args, dtype=torch.int64).to(torch.uint32).numpy().tobytes())
        kernel.launch((made.blocks, 1), made.threads, *arguments, shared=made.shared, outputs=[partial])
        return torch.equal(partial[0].permute(0, 3, 1, 2).double(), expected)

    assert passes(Kernel(ptx, name))
    pattern = r"^\s*(wgmma\.(wait_group|fence|commit_group)|fence\.|bar\.|cp\.async\.(wait|commit)_group).*$"
    left = [what for _, what in survivors(ptx, pattern, name, passes)]
    assert [what.strip() for what in left] == [
        "wgmma.commit_group.sync.aligned;",
        "wgmma.wait_group.sync.aligned 1;",
        "wgmma.wait_group.sync.aligned 1;",
    ]

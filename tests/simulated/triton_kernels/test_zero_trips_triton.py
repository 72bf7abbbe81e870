"""Loops of Triton kernels that run zero times: nothing may be read for them, not even by copies issued ahead of time.

Compilers differ in what they conclude about such a loop, so these tests run with more than one release of Triton.
"""

import dataclasses
import importlib
import inspect
import pkgutil
import re

import pytest
import torch
import torch.nn.functional as F
import triton
from helpers.support import channels_last

from resnet_fast import _triton
from resnet_fast._triton import batch_norm, batch_stats, conv_backward, finalize
from resnet_fast.backends import launch
from resnet_fast.gpu import tune
from resnet_fast.gpu.candidates.triton import candidates
from resnet_fast.gpu.layer import A100, Layer

ops = torch.ops.resnet_fast


def whole(*shape, dtype):
    return channels_last(torch.randint(-2, 3, shape).to(dtype))


def layer(x, weight, stride, role, residual=False, relu=False):
    k, c, *kernel = weight.shape
    size = (x.shape[0], *x.shape[2:], c, k, tuple(kernel), stride, (0, 0))
    return Layer(*size, x.dtype, "ieee", residual, relu, role)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(
    ("kernel", "stride"), [((1, 1), (2, 2)), ((2, 2), (3, 3)), ((2, 3), (3, 1)), ((3, 2), (1, 3))], ids=str
)
def test_data_gradient_where_no_tap_reaches(simulated_device, kernel, stride, stages):
    """In some phases of such strides the gradient is that of the residual alone. Channels fill whole tiles: what lies
    past the weights is past the buffer."""
    c, k, dtype = 64, 32, torch.float16
    x, weight = whole(2, c, 7, 6, dtype=dtype), whole(k, c, *kernel, dtype=dtype)
    grad = whole(*F.conv2d(x.float(), weight.float(), None, stride).shape, dtype=dtype)
    residual = whole(*x.shape, dtype=dtype)
    exact = F.conv_transpose2d(grad.double(), weight.double(), None, stride)
    exact = F.pad(exact, (0, x.shape[3] - exact.shape[3], 0, x.shape[2] - exact.shape[2])) + residual.double()
    coefficients = torch.stack((torch.ones(k), *torch.zeros(3, k)))
    tile = candidates(layer(x, weight, stride, "data gradient"), A100)[0]
    with tune.use(dataclasses.replace(tile, num_stages=stages)):
        for y, own in ((None, None), (grad, coefficients)):
            rest = (True, False, residual, False, [], [])
            dx, _, _ = ops.conv_backward(grad, y, own, x, None, False, weight, [*stride], [0, 0], 0, *rest)
            assert torch.equal(dx.double(), exact)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("channels", [16, 12])
def test_split_sums_without_products(simulated_device, channels, stages):
    """More parts than there are steps: some parts of the sum are empty."""
    x, weight = whole(1, channels, 5, 4, dtype=torch.float16), whole(16, channels, 1, 1, dtype=torch.float16)
    tile = candidates(layer(x, weight, (1, 1), "conv_bn_relu"), A100)[0]
    assert tile.steps(layer(x, weight, (1, 1), "conv_bn_relu")) == 1
    with tune.use(dataclasses.replace(tile, num_stages=stages, split_k=3)):
        out = ops.conv_bn(x, weight, None, None, None, None, None, 0.0, [1, 1], [0, 0])
    assert torch.equal(out.double(), F.conv2d(x.double(), weight.double()))


@pytest.mark.parametrize("stages", [2, 3])
def test_weight_gradient_without_pixels(simulated_device, stages):
    x, weight = whole(1, 32, 3, 3, dtype=torch.float16), whole(32, 32, 3, 3, dtype=torch.float16)
    grad = whole(1, 32, 1, 1, dtype=torch.float16)
    tile = candidates(layer(x, weight, (1, 1), "weight gradient"), A100)[0]
    with tune.use(dataclasses.replace(tile, num_stages=stages, split_k=3)):
        rest = (False, True, None, False, [], [])
        _, dw, _ = ops.conv_backward(grad, None, None, x, None, False, weight, [1, 1], [0, 0], 0, *rest)
    assert torch.equal(dw.double(), grad.double().view(32, 1, 1, 1) * x.double())


C = 16
ROW = torch.zeros(1, C, dtype=torch.float16)
TILE = {"BLOCK_M": 64, "BLOCK_C": 16}
FINAL = {"BLOCK_P": 64, "BLOCK_C": 16}


def floats(*shape):
    return torch.ones(shape)


def no_rows():
    """Every kernel that loops over rows or parts, with none: kernel, arguments, constants, and what outputs hold
    afterwards, by position."""
    none = torch.empty(0)
    one = floats(C)
    two = floats(2, C)
    three = floats(3, C)
    double = torch.ones(2, C, dtype=torch.float64)
    vector = {"VECTOR": 16}
    empty = torch.empty(0, C, dtype=torch.float16)
    return [
        (
            conv_backward._reduce_split_k_kernel,
            (none, one.clone(), C, 0, C, 1, 1, C, 1, 1, 1),
            {"ROWS": 2, "BLOCK": 1024, "WIDE": False},
            {1: 0.0},
        ),
        (
            finalize._finalize_stats_kernel,
            (none, None, None, None, two.clone(), two.clone(), None, None, None, None, 1, C, 1, 0, 1.0, 1.0),
            FINAL,
            {4: 0.0},
        ),
        (
            finalize._finalize_gradients_kernel,
            (none, two, None, floats(4, C), one.clone(), one.clone(), one.clone(), 1, C, 0, 1.0),
            {"ROWS": 2, "ROW": 1, "BATCH": False, **FINAL},
            {4: 0.0, 5: 0.0, 6: 0.0},
        ),
        (finalize._finalize_sums_kernel, (none, three.clone(), C, 0), {"ROWS": 3, **FINAL}, {1: 0.0}),
        (
            batch_stats._batch_stats_kernel,
            (ROW, double.clone(), 0, C // 16, 1),
            {**vector, **TILE},
            {},  # a mean of no values is NaN
        ),
        (
            batch_norm._bn_backward_reduce_kernel,
            (empty, None, None, None, empty, empty, two, two, empty, three.clone(), 0, C // 16, 1),
            {"SAME": False, "ROWS": 3, **vector, **TILE},
            {9: 0.0},
        ),
    ]


@pytest.mark.parametrize("index", range(len(no_rows())), ids=[case[0].__name__ for case in no_rows()])
def test_sums_of_nothing(simulated_device, index):
    """They are zero, and what there is not is not read."""
    kernel, arguments, constants, outputs = no_rows()[index]
    launch.launch(kernel, (1,), arguments, num_warps=4, **constants)
    for place, value in outputs.items():
        assert torch.equal(arguments[place], torch.full_like(arguments[place], value)), place


def test_every_loop_is_run_zero_times():
    """The kernels whose loops are not unrolled are those that are called above."""
    modules = [
        importlib.import_module(f"{_triton.__name__}.{found.name}") for found in pkgutil.iter_modules(_triton.__path__)
    ]
    kernels = {v.__name__: v.fn for m in modules for v in vars(m).values() if isinstance(v, triton.JITFunction)}
    looping = {name for name, fn in kernels.items() if re.search(r"for \w+ in (tl\.)?range\(", inspect.getsource(fn))}
    # The main loop runs zero times in the forward kernel alone, not in that of statistics, whose sum is not split.
    convolutions = {"mainloop", "_data_gradient_kernel", "_weight_gradient_kernel"}
    # A tile of packed filters is never empty.
    refreshing = {"_pack", "_pack_vectors"}
    assert looping == {case[0].__name__ for case in no_rows()} | convolutions | refreshing

"""Operators on the GPU against float64 on the CPU and eager on the GPU; exact on integers with every tile."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers.support import Case, assert_error_rule, channels_last, random_case
from torch import nn

from resnet_fast import ops
from resnet_fast.chain.pooling import flat_average
from resnet_fast.gpu import tune
from resnet_fast.gpu.candidates.triton import tiles
from resnet_fast.gpu.layer import Layer, gpu_of
from resnet_fast.ops.augment import augment

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = [
    # batch, channels, size, filters, kernel, stride, padding
    (2, 64, (9, 7), 64, 3, 1, 1),
    (1, 32, (11, 6), 48, 3, 2, 1),
    (3, 48, (5, 5), 17, 1, 2, 0),
    (1, 3, (13, 10), 64, 7, 2, 3),
    (2, 5, (6, 7), 3, (3, 1), (1, 2), (1, 0)),
    (130, 16, (2, 1), 16, 3, 1, 1),
]


def moved(case, device):
    """The case on the device."""
    tensors = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
    return Case(
        **{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}
        | {"bn": tuple(None if t is None else t.to(device) for t in case.bn)}
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolutions(gpu, shape, dtype):
    case = random_case(*shape, dtype=dtype)
    case.bn = tuple(t.float() for t in case.bn)
    for op in ("conv_bn", "conv_bn_relu", "conv_bn_add_relu"):
        there = moved(case, gpu)
        eager = dataclasses.replace(there, bn=tuple(t.to(dtype) for t in there.bn)).eager(op)
        out = there.fused(op)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert_error_rule(out.cpu(), case.exact(op), [eager.cpu()], op)


@pytest.mark.parametrize(("dtype", "precision"), [(t, "ieee") for t in DTYPES] + [(torch.float32, "tf32")], ids=str)
@pytest.mark.parametrize(("channels", "filters"), [(64, 128), (32, 32), (16, 16), (20, 64)], ids=str)
def test_every_tile_gives_exact_integers(gpu, channels, filters, dtype, precision):
    """Of this GPU's own list, with undivided and split sums, and as the library does it."""
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    x, residual = torch.randint(-2, 3, (3, channels, 9, 8)), torch.randint(-2, 3, (3, filters, 9, 8))
    weight = torch.randint(-2, 3, (filters, channels, 3, 3))
    expected = (F.conv2d(x.double(), weight.double(), padding=1) + residual).relu().to(dtype)
    x, residual, weight = (t.to(gpu, dtype) for t in (x, residual, weight))
    layer = Layer(3, 9, 8, channels, filters, (3, 3), (1, 1), (1, 1), dtype, precision, True, True)
    found = [dataclasses.replace(c, split_k=s) for c in tiles(layer, gpu_of(x.device)) for s in (1, 3)]
    for choice in [*found, tune.LIBRARY]:
        with tune.use(choice):
            y = ops.conv_bn_add_relu(x, residual, weight, padding=1)
        assert torch.equal(y.cpu(), expected), choice


POOLS = ([2, 2, 2, 2, 0, 0], [3, 3, 2, 2, 1, 1])


@pytest.mark.parametrize(("dtype", "precision"), [(t, "ieee") for t in DTYPES] + [(torch.float32, "tf32")], ids=str)
@pytest.mark.parametrize("pool", POOLS, ids=["2x2", "3x3"])
@pytest.mark.parametrize("shape", [(3, (61, 72), 7, 3, 64), (2, (33, 37), 7, 3, 48), (2, (30, 41), 3, 1, 80)], ids=str)
def test_pooled_stems_give_exact_integers(gpu, shape, pool, dtype, precision):
    """Images of either layout, a slice, and one with a NaN; several shares of a warp."""
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    batch, size, kernel, padding, filters = shape
    x, weight = torch.randint(-2, 3, (batch, 3, *size)).to(dtype), torch.randint(-2, 3, (filters, 3, kernel, kernel))
    shift = torch.randint(-2, 3, (filters,)).to(dtype)
    x[0, 1, 5, 7], weight = torch.nan, weight.to(dtype)
    z = F.conv2d(x.double(), weight.double(), shift.double(), 2, padding).relu()
    expected = F.max_pool2d(z, pool[:2], pool[2:4], pool[4:]).to(dtype).nan_to_num(7)
    filters = [torch.ops.resnet_fast.pack_conv_bn(weight.to(gpu), shift.to(gpu), *[None] * 4, 0.0)]
    layers = [0, -1, 1, weight.shape[0], kernel, kernel, 2, 2, padding, padding]
    wide = torch.zeros(batch, 4, size[0], size[1] + 3, dtype=dtype)
    wide[:, 1:, :, 2:-1] = x
    for image in (x.to(gpu), channels_last(x).to(gpu), wide.to(gpu)[:, 1:, :, 2:-1]):
        y = torch.ops.resnet_fast.conv_chain(image, filters, layers, pool)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y.cpu().nan_to_num(7), expected)


@pytest.mark.machine
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", POOLS, ids=["2x2", "3x3"])
def test_pooled_stems_of_full_size(gpu, pool, dtype):
    """The images of ImageNet, in each size of batch that is shared out in another way; the same bits again."""
    weight = torch.randint(-2, 3, (64, 3, 7, 7), device=gpu).to(dtype)
    filters = [torch.ops.resnet_fast.pack_conv_bn(weight, *[None] * 5, 0.0)]
    layers = [0, -1, 0, 64, 7, 7, 2, 2, 3, 3]
    for batch in (1, 2, 8, 33, 64):
        x = torch.randint(-2, 3, (batch, 3, 224, 224), device=gpu).to(dtype)
        z = F.conv2d(x.float(), weight.float(), None, 2, 3)
        expected = F.max_pool2d(z, pool[:2], pool[2:4], pool[4:]).to(dtype)
        for image in (x, channels_last(x)):
            y = torch.ops.resnet_fast.conv_chain(image, filters, layers, pool)
            assert torch.equal(y, expected)
            assert torch.equal(y, torch.ops.resnet_fast.conv_chain(image, filters, layers, pool))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_average_pooling_into_a_matrix(gpu, dtype):
    for shape, pool in (((5, 512, 7, 7), nn.AvgPool2d(2)), ((3, 72, 7, 6), nn.AdaptiveAvgPool2d(1))):
        x = channels_last(torch.randint(-8, 9, shape).to(dtype))
        y = flat_average(pool, channels_last(x.to(gpu)))
        assert y is not None
        cells = 4 if shape[1] == 512 else 42
        expected = ((torch.flatten(pool(x.double()), 1) * cells).round().float() / cells).to(dtype)
        assert torch.equal(y.cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_relu(gpu, dtype):
    a, b = torch.randn(3, 5, 7, 11).to(dtype), torch.randn(3, 5, 7, 11).to(dtype)
    a[1, 2, 3, 4] = torch.nan
    out = ops.add_relu(a.to(gpu), channels_last(b.to(gpu))).cpu()
    assert torch.equal(out.nan_to_num(7), F.relu(a + b).nan_to_num(7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_augment(gpu, dtype):
    """As they are, the values of the table; cropped and mirrored, what the CPU's kernel gives."""
    images = torch.randint(0, 256, (7, 3, 19, 23), dtype=torch.uint8)
    index, table = torch.tensor([6, -1, *range(6)]), torch.randn(3, 256).to(dtype)
    plain = torch.stack([table[k][images[index][:, k].long()] for k in range(3)], 1)
    plain[1] = table[:, 0, None, None]
    moved_there = [t.to(gpu) for t in (images, index, table)]
    assert torch.equal(augment(*moved_there, None, 4, True).cpu(), plain)
    there = augment(*moved_there, -(2**62) - 5, 4, True)
    assert there.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(there.cpu(), augment(images, index, table, -(2**62) - 5, 4, True))


@pytest.mark.machine
def test_more_than_32_bits_of_elements(gpu):
    """2^31 elements and some: 4.3 GB a map in 16 bits."""
    x = torch.zeros(33, 16, 2048, 2048, dtype=torch.float16, device=gpu).to(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    x[-1, :, -1, -1] = 3
    weight = torch.eye(16, dtype=torch.float16, device=gpu)[:, :, None, None]
    y = ops.conv_bn_relu(x, weight)
    assert torch.equal(y[-1, :, -1, -1], x[-1, :, -1, -1])
    assert y.count_nonzero() == 16
    assert ops.add_relu(x, y)[-1, :, -1, -1].tolist() == [6.0] * 16

"""Whole networks on the GPU: fused against float64 by the error rule, nothing unfused on the way."""

import copy

import pytest
import torch
from helpers.support import assert_error_rule, randomize_

import resnet_fast
from resnet_fast import backends, reference


def check(device, fast, twin, shape, dtype, method):
    randomize_(fast.eval())
    twin.load_state_dict(fast.state_dict())
    x = torch.randn(shape)
    with torch.no_grad():
        exact = getattr(copy.deepcopy(twin).double().eval(), method)(x.double())
        there = x.to(device, dtype)
        low = copy.deepcopy(twin).eval().to(device, dtype)
        eager = [
            getattr(low.to(memory_format=f), method)(there.contiguous(memory_format=f)).cpu()
            for f in (torch.contiguous_format, torch.channels_last)
        ]
        fast = fast.to(device, dtype)
        out = getattr(fast, method)(there)
        again = getattr(fast, method)(there)
    assert torch.equal(out, again)
    assert backends.fallbacks() == {}
    assert_error_rule(out.cpu(), exact, eager)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_cifar_resnet32(gpu, dtype):
    check(gpu, resnet_fast.cifar_resnet32(), reference.cifar_resnet32(), (2, 3, 16, 16), dtype, "features")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_blocks(gpu, dtype):
    fast, twin = resnet_fast.blocks, reference
    check(gpu, fast.Bottleneck(32, 16, 2), twin.Bottleneck(32, 16, 2), (2, 32, 9, 7), dtype, "forward")
    check(gpu, fast.BasicBlock(16, 32, 2), twin.BasicBlock(16, 32, 2), (2, 16, 7, 6), dtype, "forward")


@pytest.mark.machine
@pytest.mark.parametrize("name", ["ResNet32", "resnet18", "resnet50"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_networks_of_full_size(gpu, name, dtype):
    check(gpu, getattr(resnet_fast, name)(), getattr(reference, name)(), (2, 3, 224, 224), dtype, "features")


@pytest.mark.machine
def test_autocast(gpu):
    model = randomize_(resnet_fast.cifar_resnet20().eval()).to(gpu)
    x = torch.randn(4, 3, 32, 32, device=gpu)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    assert backends.fallbacks() == {}

"""Whole networks on the kernels in CUDA C++: the same modules on CPU tensors, every kernel run by the simulator."""

import copy

import pytest
import torch
from helpers.cuda_support import cuda_device
from helpers.support import assert_error_rule, randomize_

import resnet_fast
from resnet_fast import backends, reference


@pytest.fixture(autouse=True)
def exact_float32():
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def check(name, shape, dtype, convolutions, stems=0, **options):
    """The last feature map by the error rule; every convolution of it in CUDA C++, one launch each; stems: those that
    pool, too."""
    model = randomize_(getattr(resnet_fast, name)(**options)).eval()
    twin = getattr(reference, name)(**options).eval()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(shape)
    with torch.no_grad():
        exact = copy.deepcopy(twin).double().features(x.double())
        low = copy.deepcopy(twin).to(dtype)
        layouts = (torch.contiguous_format, torch.channels_last)
        eager = [low.features(x.to(dtype).contiguous(memory_format=f)) for f in layouts]
        with cuda_device() as device:
            out = model.to(dtype).features(x.to(dtype))
    assert_error_rule(out, exact, eager, name)
    assert backends.fallbacks() == {}
    for kernel, count in (("conv_bn_relu_fwd_kernel<", convolutions), ("conv_bn_relu_pool_fwd_kernel<", stems)):
        assert len([n for n, _ in device.launches if n.startswith(kernel)]) == count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cifar_resnet32(dtype):
    check("cifar_resnet32", (2, 3, 16, 16), dtype, 33)  # 31 and two projections


def test_resnet32():
    check("ResNet32", (1, 3, 64, 64), torch.float16, 2 * 16 + 3, 1, image_size=64)  # blocks, projections; the stem


def test_named_backends():
    """Either kind of kernels alone, by name."""
    block = randomize_(resnet_fast.blocks.BasicBlock(16, 16)).eval()
    x = torch.randn(1, 16, 4, 4)
    with torch.no_grad(), cuda_device() as device:
        assert backends.status()["cuda"] == backends.status()["triton"] == "loaded"
        block(x)
        with backends.use("triton"):
            block(x)
    kinds = ["cuda" if name.startswith("conv_bn_relu_fwd_kernel<") else "triton" for name, _ in device.launches]
    assert kinds == ["cuda"] * 2 + ["triton"] * 2


def test_what_has_no_kernel_is_named():
    block = resnet_fast.blocks.BasicBlock(16, 16).eval().double()
    with cuda_device(), torch.no_grad(), pytest.raises(RuntimeError, match=r"no kernel for torch\.float64"):
        block(torch.randn(1, 16, 4, 4).double())

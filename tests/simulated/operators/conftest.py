"""Operators on both kinds of GPU kernels, Triton's and those in CUDA C++, executed in the simulator."""

import pytest
import torch
from helpers.cuda_support import simulated_backend


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """float32 means float32, but where a test asks for TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    return request.param


@pytest.fixture
def device(backend):
    with simulated_backend(backend) as simulated:
        yield simulated


@pytest.fixture
def kernel(backend):
    """What the names of the convolution's launches begin with."""
    return {"triton": "_conv_bn_relu_fwd_kernel", "cuda": "conv_bn_relu_fwd_kernel<"}[backend]

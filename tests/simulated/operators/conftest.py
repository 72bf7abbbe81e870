"""Operators on both kinds of GPU kernels, Triton's and those in CUDA C++, executed in the simulator."""

import pytest
from helpers.cuda_support import simulated_backend


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

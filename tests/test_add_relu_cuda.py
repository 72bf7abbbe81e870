"""The CUDA kernel of add_relu, compiled by nvcc and executed in the simulator with the launcher's own geometry."""

import re
from pathlib import Path

import pytest
import torch
from ptxsim.compilers import compile_cuda

from resnet_fast import launch

INCLUDE = (f"-I{Path(__file__).parent.parent / 'kernels/csrc/cuda'}", "-std=c++20")
TYPES = {torch.float32: "float", torch.float64: "double", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
THREADS = 256  # kAddReluThreads


def add_relu(device, a, b, vectorized):
    t = TYPES[a.dtype]
    source = f"""#include "add_relu.cuh"
    namespace resnet_fast::cuda {{
    template __global__ void add_relu_fwd_kernel<{t}>(const {t}*, const {t}*, {t}*, int64_t, bool);
    }}"""
    (name,) = re.findall(r"\.entry (\w+)", compile_cuda(source, *INCLUDE))
    device.add_cuda(source, name, flags=INCLUDE)
    out = torch.empty_like(a)
    blocks = -(-a.numel() // (THREADS * (16 // a.dtype.itemsize)))  # add_relu_blocks
    launch.cuda_launch(name, (blocks,), (THREADS,), 0, (a, b, out, a.numel(), vectorized))
    return out


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3, 17, 2048, 4099])
def test_values(simulated_device, dtype, n):
    a, b = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    a[n // 2] = torch.nan
    for vectorized in (True, False):
        out = add_relu(simulated_device, a, b, vectorized)
        assert torch.equal(out.nan_to_num(7), torch.relu(a + b).nan_to_num(7))  # one rounding, as in eager


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_traffic(simulated_device, dtype):
    """Every byte moves once, in whole sectors: two reads and a write of each element."""
    n = 4096
    add_relu(simulated_device, torch.randn(n).to(dtype), torch.randn(n).to(dtype), True)
    _, report = simulated_device.launches[-1]
    touched, least = report.sectors
    assert touched == least == 3 * n * dtype.itemsize // 32
    assert report.compulsory_bytes == (2 * n * dtype.itemsize, n * dtype.itemsize)

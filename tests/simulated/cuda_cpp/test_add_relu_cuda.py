"""The CUDA kernel of add_relu, compiled by nvcc and executed in the simulator with the launcher's own geometry."""

import re
from pathlib import Path

import pytest
import torch
from ptxsim import Kernel
from ptxsim.compilers import compile_cuda

from resnet_fast import launch

INCLUDE = (f"-I{Path(__file__).parents[3] / 'kernels/csrc'}", "-std=c++20", "--expt-relaxed-constexpr")
TYPES = {torch.float32: "float", torch.float64: "double", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}


def launcher_geometry(ptx, n):
    """Blocks and threads, from the launcher's own functions."""
    out = torch.empty(2, dtype=torch.int64)
    Kernel(ptx, "geometry").launch(1, 1, n, out, outputs=[out])
    return out.tolist()


def add_relu(device, a, b, vectorized):
    t = TYPES[a.dtype]
    source = f"""#include "cuda/add_relu.cuh"
    namespace resnet_fast::cuda {{
    template __global__ void add_relu_fwd_kernel<{t}>(const {t}*, const {t}*, {t}*, int64_t, bool);
    extern "C" __global__ void geometry(int64_t n, int64_t* out) {{
      out[0] = add_relu_blocks<{t}>(n);
      out[1] = kAddReluThreads;
    }}
    }}"""
    ptx = compile_cuda(source, *INCLUDE)
    (name,) = re.findall(r"\.entry (\w*add_relu\w*)", ptx)
    device.add_cuda(source, name, flags=INCLUDE)
    out = torch.empty_like(a)
    blocks, threads = launcher_geometry(ptx, a.numel())
    launch.cuda_launch(name, (blocks,), (threads,), 0, (a, b, out, a.numel(), vectorized))
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

"""add_relu in the simulator: Triton's kernel behind its launcher, that of CUDA C++ with its launcher's own geometry."""

import re

import pytest
import torch
import torch.nn.functional as F
from helpers.cuda_support import FLAGS
from helpers.support import channels_last
from ptxsim import Kernel
from ptxsim.compilers import compile_cuda

from resnet_fast._triton import add_relu as triton_kernel
from resnet_fast.backends import launch

TYPES = {torch.float32: "float", torch.float64: "double", torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}


def cuda_kernel(device, a, b, vectorized):
    t = TYPES[a.dtype]
    source = f"""#include "cuda/add_relu.cuh"
    namespace resnet_fast::cuda {{
    template __global__ void add_relu_fwd_kernel<{t}>(const {t}*, const {t}*, {t}*, int64_t, bool);
    extern "C" __global__ void geometry(int64_t n, int64_t* out) {{
      out[0] = add_relu_blocks<{t}>(n);
      out[1] = kAddReluThreads;
    }}
    }}"""
    ptx = compile_cuda(source, *FLAGS)
    (name,) = re.findall(r"\.entry (\w*add_relu\w*)", ptx)
    device.add_cuda(source, name, flags=FLAGS)
    out, geometry = torch.empty_like(a), torch.empty(2, dtype=torch.int64)
    Kernel(ptx, "geometry").launch(1, 1, a.numel(), geometry, outputs=[geometry])
    blocks, threads = geometry.tolist()
    launch.cuda_launch(name, (blocks,), (threads,), 0, (a, b, out, a.numel(), vectorized))
    return out


def results(device, backend, a, b):
    if backend == "triton":
        return [triton_kernel.add_relu(a, b)]
    return [cuda_kernel(device, a, b, vectorized) for vectorized in (True, False)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3, 17, 2048, 4099])
def test_values(device, backend, dtype, n):
    a, b = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    a[n // 2], a[0], b[0] = torch.nan, -0.0, -0.0
    expected = F.relu(a + b).nan_to_num(7)  # one rounding, as in eager
    for out in results(device, backend, a, b):
        assert torch.equal(out.nan_to_num(7), expected)
        assert torch.equal(out.nan_to_num(7).signbit(), expected.signbit())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_byte_moves_once(device, backend, dtype):
    """In whole sectors: two reads and a write of each element."""
    a, b = (channels_last(torch.randn(2, 16, 8, 16).to(dtype)) for _ in range(2))
    out = results(device, backend, a, b)[0]
    assert out.stride() == a.stride()
    _, report = device.launches[0]
    assert report.compulsory_bytes == (2 * a.nbytes, a.nbytes)
    assert report.sectors == (3 * a.nbytes // 32,) * 2

"""Counters against counts made by hand."""

import numpy as np
import pytest
import torch

from ptxsim import Kernel
from ptxsim import triton_kernels as kernels
from ptxsim.compilers import compile_cuda
from ptxsim.device import SimulatedDevice

SOURCE = """
extern "C" {
__global__ void strided(const float* x, float* y, int step) { y[threadIdx.x] = x[threadIdx.x * step]; }
__global__ void columns(float* y, int pitch) {
  extern __shared__ float tile[];
  tile[threadIdx.x * pitch] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x * pitch];
}
__global__ void wide(float4* y) {
  __shared__ float4 tile[32];
  tile[threadIdx.x] = make_float4(0, 1, 2, 3);
  __syncthreads();
  y[threadIdx.x] = tile[threadIdx.x];
}
__global__ void split(float* y) {
  if (threadIdx.x % 2) y[threadIdx.x] = 1;
  for (int i = 0; i < threadIdx.x % 4; ++i) y[threadIdx.x + 32] = i;
}
}
"""


@pytest.fixture(scope="module")
def ptx():
    return compile_cuda(SOURCE)


@pytest.mark.parametrize(("step", "sectors"), [(1, 4), (2, 8), (8, 32), (0, 1)])
def test_sectors(ptx, step, sectors):
    x, y = np.zeros(32 * max(1, step), "f"), np.zeros(32, "f")
    report = Kernel(ptx, "strided").launch(1, 32, x, y, step)
    load, store = report.classes["load_global"], report.classes["store_global"]
    assert (load["units"], load["ideal"]) == (sectors, 4 if step else 1)
    assert (store["units"], store["ideal"], store["bytes"]) == (4, 4, 128)
    assert report.buffers["arg0"]["read"] == (128 if step else 4)
    assert report.buffers["arg1"]["written"] == 128


@pytest.mark.parametrize(("pitch", "wavefronts"), [(1, 1), (2, 2), (32, 32), (33, 1)])
def test_bank_conflicts(ptx, pitch, wavefronts):
    y = np.zeros(32, "f")
    report = Kernel(ptx, "columns").launch(1, 32, y, pitch, shared=4 * 32 * 33)
    assert report.wavefronts == (2 * wavefronts, 2)
    assert len(report.conflicts()) == (2 if wavefronts > 1 else 0)


def test_wide_accesses_take_a_wavefront_for_each_128_bytes(ptx):
    assert Kernel(ptx, "wide").launch(1, 32, np.zeros(128, "f")).wavefronts == (8, 8)


def test_divergence_and_lanes(ptx):
    report = Kernel(ptx, "split").launch(1, 32, np.zeros(64, "f"))
    assert report.divergent_branches >= 2
    assert report.total("lanes") < 32 * report.total("warps")


def test_a_convolution_reads_its_input_once():
    x, f = torch.randn(1, 8, 8, 32).half(), torch.randn(3, 3, 32, 32).half()
    out = torch.empty(1, 8, 8, 32, dtype=torch.half)
    device = SimulatedDevice()
    device.triton(
        kernels.conv3x3, (1, 1), (x, f, torch.zeros(32), out, 1, 8, 8), {"C": 32, "K": 32, "BM": 64, "BN": 32, "BC": 32}
    )
    report = device.launches[0][1]
    assert report.buffers["x"] == {"bytes": 4096, "read": 4096, "written": 0}
    assert report.buffers["out"]["written"] == 4096
    assert report.buffers["w"]["read"] == 9 * 32 * 32 * 2
    assert report.mma_flops == {"m16n8k16": 2 * 64 * 32 * 9 * 32}
    # every tap loads the input again, less the rows and columns its shift moves out; filters once, 2048 bytes a tap
    taps = sum((8 - abs(dy)) * (8 - abs(dx)) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
    assert report.classes["async_copy"]["units"] * 32 == taps * 64 + 9 * 2048
    assert "test" not in report.table()
    assert "triton_kernels.py" in report.table()


def test_runs_are_repeatable_and_seeds_change_the_order(ptx):
    counts = []
    for seed in (1, 1, 2):
        out = torch.zeros(1)
        x = torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(4096).remainder(24)
        report = Kernel(compile_cuda(ATOMIC), "sum").launch(32, 128, x, out, seed=seed)
        counts.append((report.executed, out.item()))
    assert counts[0] == counts[1]
    assert counts[0][1] != counts[2][1]


ATOMIC = 'extern "C" __global__ void sum(const float* x, float* y) { atomicAdd(y, x[blockIdx.x * 128 + threadIdx.x]); }'

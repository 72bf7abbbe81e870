"""The launch seam: Python written for the GPU runs on CPU tensors, through the same compiled kernels."""

import subprocess
import sys

import pytest
import torch

from ptxsim import Fault
from ptxsim import triton_kernels as kernels
from resnet_fast import launch

CUDA = """
extern "C" __global__ void add_relu(const float* x, const float* y, float* out, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = fmaxf(x[i] + y[i], 0.f);
}
"""


def add_relu_geometry(n: int) -> tuple[tuple[int], tuple[int]]:
    return (-(-n // 256),), (256,)


def add_relu(x, y):
    out = torch.empty_like(x)
    grid, block = add_relu_geometry(x.numel())
    launch.cuda_launch("add_relu", grid, block, 0, (x, y, out, x.numel()))
    return out


def softmax(x):
    y = torch.empty_like(x)
    launch.launch(kernels.softmax, (x.shape[0],), (x, y, x.shape[1]), B=1024, num_warps=4)
    return y


def test_triton_and_cuda_launches(simulated_device):
    simulated_device.add_cuda(CUDA, "add_relu")
    x, y = torch.randn(4, 900), torch.randn(4, 900)
    out = softmax(add_relu(x, y))
    assert (out - torch.softmax(torch.relu(x + y), 1)).abs().max() < 1e-6
    (first, a), (second, b) = simulated_device.launches
    assert (first, second) == ("add_relu", "softmax")
    assert a.compulsory_bytes == (2 * 14400, 14400)
    assert b.compulsory_bytes == (14400, 14400)
    assert a.sectors == (3 * 450, 3 * 450)  # each byte moved once
    assert launch.is_simulated()


def test_the_seam_is_restored():
    from ptxsim.device import simulated

    with simulated():
        assert launch.is_simulated()
    assert not launch.is_simulated()
    assert launch.device() is launch.gpu


def test_grid_as_function_and_specialisation(simulated_device):
    """Odd and even sizes compile to different kernels, as on the GPU: divisibility by 16 is an attribute."""
    for n in (1024, 1000, 1001):
        x, y = torch.randn(n), torch.randn(n)
        out = torch.empty(n)
        launch.launch(kernels.add_relu, lambda meta: (-(-meta["n"] // meta["B"]),), (x, y, out, n), B=256)
        assert torch.equal(out, torch.relu(x + y))
    vector = [
        max(r.text.count("%") for r in rep.rows if r.kind == "load_global") for _, rep in simulated_device.launches
    ]
    assert vector[0] > vector[2]  # wide loads only where the size allows them


def test_reading_what_nothing_wrote_is_found_across_launches(simulated_device):
    simulated_device.add_cuda(CUDA, "add_relu")
    half = torch.empty(512)
    half[:256] = 1
    with pytest.raises(Fault, match="uninitialised"):
        add_relu(half, torch.ones(512))
    out = torch.empty(512)
    launch.cuda_launch("add_relu", (1,), (256,), 0, (torch.ones(512), torch.ones(512), out, 256))
    with pytest.raises(Fault, match="nothing has written"):
        add_relu(out, torch.ones(512))
    assert out[:256].eq(2).all()
    assert out[256:].isnan().all()
    out[256:] = 0
    assert add_relu(out, torch.ones(512)).tolist() == [3.0] * 256 + [1.0] * 256


def test_empty_launch_and_unknown_kernel(simulated_device):
    launch.cuda_launch("add_relu", (0,), (256,), 0, ())
    assert simulated_device.launches == []
    with pytest.raises(KeyError, match="nowhere"):
        launch.cuda_launch("nowhere", (1,), (32,), 0, ())


def test_production_device_names_a_missing_kernel():
    with pytest.raises(RuntimeError, match="without the CUDA kernel 'nowhere'"):
        launch.cuda_launch("nowhere", (1,), (32,), 0, ())
    seen = []
    launch.gpu.register("ptxsim_probe", lambda *a: seen.append(a))
    launch.cuda_launch("ptxsim_probe", [2, 1], (32,), 16, [1.5])
    assert seen == [((2, 1), (32,), 16, (1.5,))]


def test_import_needs_neither_triton_nor_torch():
    code = (
        "import sys, importlib.util as u\n"
        "s = u.spec_from_file_location('launch', sys.argv[1])\n"
        "s.loader.exec_module(u.module_from_spec(s))\n"
        "assert not {'triton', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, launch.__file__], check=True)

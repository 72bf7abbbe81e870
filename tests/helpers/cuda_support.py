"""The CUDA C++ kernels for the simulated device, by the names under which the launch seam knows them."""

import contextlib
import re
from pathlib import Path

import torch
from ptxsim.device import simulated

from resnet_fast import backends

from . import hopper_training_support

SOURCES = Path(__file__).parents[2] / "kernels/csrc"
FLAGS = (f"-I{SOURCES}", "-std=c++20", "--expt-relaxed-constexpr")
TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}


def find_cuda(name):
    """Source, flags and a part of the mangled name of one kernel, an instance that the extension holds, too."""
    found = re.fullmatch(r"(\w+)<(\w+), (\d+)>", name)
    if found is None:
        return None
    stem, dtype, number = found.groups()
    t = TYPES[dtype]
    if stem == "conv_bn_relu_fwd_kernel":
        source = f"""#include "cuda/conv/conv_bn_relu.cuh"
        template __global__ void resnet_fast::cuda::conv_bn_relu_fwd_kernel<{t}, {number}>(
            const {t}*, const {t}*, const float*, const float*, const {t}*, {t}*, float*, int*,
            const __grid_constant__ resnet_fast::cuda::ConvArgs);"""
        return source, FLAGS, stem
    if stem == "conv_halo_fwd_kernel":
        tile, stride, chunk = int(number) // 6, 1 + int(number) % 6 // 3, 64 >> int(number) % 3
        source = f"""#include "cuda/hopper/conv_halo.cuh"
        template __global__ void resnet_fast::cuda::conv_halo_fwd_kernel<{t}, {tile}, {chunk}, {stride}>(
            const {t}*, const {t}*, const float*, const float*, const {t}*, {t}*, float*, int*,
            const __grid_constant__ resnet_fast::cuda::HaloArgs);"""
        return source, (*FLAGS, "-arch=sm_90a"), stem
    if stem == "conv1x1_fwd_kernel":
        source = f"""#include "cuda/hopper/conv1x1.cuh"
        template __global__ void resnet_fast::cuda::conv1x1_fwd_kernel<{t}, {number}>(
            const {t}*, const {t}*, const float*, const float*, const {t}*, {t}*, float*, int*,
            const __grid_constant__ resnet_fast::cuda::Conv1x1Args);"""
        return source, (*FLAGS, "-arch=sm_90a"), stem
    if stem in ("conv_halo_stats_kernel", "conv_halo_gradient_kernel"):
        tile, stride, chunk = int(number) // 6, 1 + int(number) % 6 // 3, 64 >> int(number) % 3
        dtype, gradient = getattr(torch, dtype), stem == "conv_halo_gradient_kernel"
        return hopper_training_support.source(dtype, tile, chunk, stride, gradient), (*FLAGS, "-arch=sm_90a"), stem
    if stem == "weight_gradient_kernel":
        source = f"""#include "cuda/hopper/weight_gradient.cuh"
        template __global__ void resnet_fast::cuda::weight_gradient_kernel<{t}, {number}>(
            const {t}*, const {t}*, const float*, const {t}*, const float*, float*,
            const __grid_constant__ resnet_fast::cuda::GradientArgs);"""
        return source, (*FLAGS, "-arch=sm_90a"), stem
    if stem == "conv_bn_relu_pool_fwd_kernel":
        source = f"""#include "cuda/stem/conv_bn_relu_pool.cuh"
        template __global__ void resnet_fast::cuda::conv_bn_relu_pool_fwd_kernel<{t}, {number}>(
            const {t}*, const {t}*, const float*, const float*, {t}*,
            const __grid_constant__ resnet_fast::cuda::StemArgs);"""
        return source, FLAGS, stem
    if stem == "avg_pool_flatten_fwd_kernel":
        source = f"""#include "cuda/avg_pool_flatten.cuh"
        template __global__ void resnet_fast::cuda::avg_pool_flatten_fwd_kernel<{t}>(
            const {t}*, {t}*, const __grid_constant__ resnet_fast::cuda::AvgPoolArgs);"""
        return source, FLAGS, stem
    return None


@contextlib.contextmanager
def cuda_device(**options):
    """While open, the package's operators run the CUDA C++ kernels in the simulator; gives the device."""
    with simulated(find_cuda=find_cuda, **options) as device, backends.use("cuda"):
        yield device


def simulated_backend(backend, **options):
    """The simulated device on which the operators run on kernels of one kind, "triton" or "cuda"."""
    return cuda_device(**options) if backend == "cuda" else simulated(**options)

"""The CUDA C++ kernels for the simulated device, by the names under which the launch seam knows them."""

import contextlib
import re
from pathlib import Path

from ptxsim.device import simulated

from resnet_fast import backends

SOURCES = Path(__file__).parents[2] / "kernels/csrc/cuda"
FLAGS = (f"-I{SOURCES}", "-std=c++20", "--expt-relaxed-constexpr")
TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}


MANGLED = {"float": "f", "__half": "6__half", "__nv_bfloat16": "13__nv_bfloat16"}
_AFFINE = "const float*, const float*, const float*, const float*"
_IMAGES = "const {t}*, const {t}*"
# By the launch seam's names: the template, what follows the type in its arguments, and its parameters.
BATCH_NORM = {
    "bn_stats_partial": ("bn_stats_partial_kernel", ["{v}"], "const {t}*, double*"),
    "bn_stats_final": ("bn_stats_final_kernel", [], "const {t}*, const double*, float*, float*, float*"),
    "bn_apply": ("bn_apply_kernel", ["{v}", "false"], f"{_IMAGES}, {_AFFINE}, {{t}}*, uint8_t*"),
    "bn_apply_add": ("bn_apply_kernel", ["{v}", "true"], f"{_IMAGES}, {_AFFINE}, {{t}}*, uint8_t*"),
    "bn_backward_sums": (
        *("bn_backward_sums_kernel", ["{v}", "false"]),
        f"{_IMAGES}, const uint8_t*, {_AFFINE}, {{t}}*, float*",
    ),
    "bn_backward_sums_add": (
        *("bn_backward_sums_kernel", ["{v}", "true"]),
        f"{_IMAGES}, const uint8_t*, {_AFFINE}, {{t}}*, float*",
    ),
    "bn_backward_final": ("bn_backward_final_kernel", [], "const {t}*, const {t}*, const {t}*, {t}*, {t}*, {t}*"),
    "bn_backward_apply": ("bn_backward_apply_kernel", ["{v}", "false"], f"{_IMAGES}, const float*, {_AFFINE}, {{t}}*"),
    "bn_backward_apply_relu": (
        *("bn_backward_apply_kernel", ["{v}", "true"]),
        f"{_IMAGES}, const float*, {_AFFINE}, {{t}}*",
    ),
}


def find_cuda(name):
    """Source, flags and a part of the mangled name of one kernel, an instance that the extension holds, too."""
    found = re.fullmatch(r"(\w+)<(\w+), (\d+)>", name)
    if found is None:
        return None
    stem, dtype, number = found.groups()
    t = TYPES[dtype]
    if stem == "conv_bn_relu_fwd_kernel":
        source = f"""#include "conv_bn_relu.cuh"
        template __global__ void resnet_fast::cuda::conv_bn_relu_fwd_kernel<{t}, {number}>(
            const {t}*, const {t}*, const float*, const float*, const {t}*, {t}*, float*, int*,
            const __grid_constant__ resnet_fast::cuda::ConvArgs);"""
        return source, FLAGS, stem
    if stem == "conv_halo_fwd_kernel":
        tile, stride, chunk = int(number) // 6, 1 + int(number) % 6 // 3, 64 >> int(number) % 3
        source = f"""#include "hopper/conv_halo.cuh"
        template __global__ void resnet_fast::cuda::conv_halo_fwd_kernel<{t}, {tile}, {chunk}, {stride}>(
            const {t}*, const {t}*, const float*, const float*, const {t}*, {t}*, float*, int*,
            const __grid_constant__ resnet_fast::cuda::HaloArgs);"""
        return source, (*FLAGS, "-arch=sm_90a"), stem
    if stem == "conv_bn_relu_pool_fwd_kernel":
        source = f"""#include "conv_bn_relu_pool.cuh"
        template __global__ void resnet_fast::cuda::conv_bn_relu_pool_fwd_kernel<{t}, {number}>(
            const {t}*, const {t}*, const float*, const float*, {t}*,
            const __grid_constant__ resnet_fast::cuda::StemArgs);"""
        return source, FLAGS, stem
    if stem == "avg_pool_flatten_fwd_kernel":
        source = f"""#include "avg_pool_flatten.cuh"
        template __global__ void resnet_fast::cuda::avg_pool_flatten_fwd_kernel<{t}>(
            const {t}*, {t}*, const __grid_constant__ resnet_fast::cuda::AvgPoolArgs);"""
        return source, FLAGS, stem
    # All of a type at once: they are small, and a run of the compiler is not.
    instances = set()
    for kernel, flags, parameters in BATCH_NORM.values():
        for v in ("false", "true"):
            arguments = ", ".join([t, *(f.format(v=v) for f in flags)])
            if kernel != "bn_backward_final_kernel" or t == "float":
                instances.add(
                    f"template __global__ void {kernel}<{arguments}>({parameters.format(t=t)}, "
                    "const __grid_constant__ BnArgs);"
                )
    kernel, flags, _ = BATCH_NORM[stem]
    source = f"""#include "batch_norm.cuh"
    namespace resnet_fast::cuda {{ {" ".join(sorted(instances))} }}"""
    values = (f.format(v="true" if number == "1" else "false") for f in flags)
    return source, FLAGS, f"{kernel}I{MANGLED[t]}" + "".join(f"Lb{int(v == 'true')}E" for v in values) + "E"


@contextlib.contextmanager
def cuda_device(**options):
    """While open, the package's operators run the CUDA C++ kernels in the simulator; gives the device."""
    with simulated(find_cuda=find_cuda, **options) as device, backends.use("cuda"):
        yield device

"""The CUDA C++ kernels for the simulated device, by the names under which the launch seam knows them."""

import contextlib
import re
from pathlib import Path

from ptxsim.device import simulated

from resnet_fast import backends

SOURCES = Path(__file__).parent.parent / "kernels/csrc/cuda"
FLAGS = (f"-I{SOURCES}", "-std=c++20", "--expt-relaxed-constexpr")
TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}


CONVOLUTION = (
    "conv_bn_relu_fwd_kernel<{t}, {i}>",
    "const {t}*, const {t}*, const float*, const float*, const {t}*, {t}*, float*, int*",
    "ConvArgs",
)
_AFFINE = "const float*, const float*, const float*, const float*"
BATCH_NORM = {
    "bn_stats_partial": ("bn_stats_partial_kernel<{t}, {i}>", "const {t}*, double*"),
    "bn_stats_final": ("bn_stats_final_kernel<{t}>", "const {t}*, const double*, float*, float*, float*"),
    "bn_apply": ("bn_apply_kernel<{t}, {i}, false>", f"const {{t}}*, const {{t}}*, {_AFFINE}, {{t}}*, uint8_t*"),
    "bn_apply_add": ("bn_apply_kernel<{t}, {i}, true>", f"const {{t}}*, const {{t}}*, {_AFFINE}, {{t}}*, uint8_t*"),
    "bn_backward_sums": (
        "bn_backward_sums_kernel<{t}, {i}, false>",
        f"const {{t}}*, const {{t}}*, const uint8_t*, {_AFFINE}, {{t}}*, float*",
    ),
    "bn_backward_sums_add": (
        "bn_backward_sums_kernel<{t}, {i}, true>",
        f"const {{t}}*, const {{t}}*, const uint8_t*, {_AFFINE}, {{t}}*, float*",
    ),
    "bn_backward_final": (
        "bn_backward_final_kernel<{t}>",
        "const {t}*, const {t}*, const {t}*, {t}*, {t}*, {t}*",
    ),
    "bn_backward_apply": (
        "bn_backward_apply_kernel<{t}, {i}, false>",
        f"const {{t}}*, const {{t}}*, const float*, {_AFFINE}, {{t}}*",
    ),
    "bn_backward_apply_relu": (
        "bn_backward_apply_kernel<{t}, {i}, true>",
        f"const {{t}}*, const {{t}}*, const float*, {_AFFINE}, {{t}}*",
    ),
}


def find_cuda(name):
    """Source and flags of one kernel, an instance that the extension holds, too."""
    found = re.fullmatch(r"(\w+)<(\w+), (\d+)>", name)
    if found is None:
        return None
    stem, dtype, i = found.groups()
    if stem == "conv_bn_relu_fwd_kernel":
        header, (kernel, parameters, args) = "conv_bn_relu.cuh", CONVOLUTION
    else:
        header, (kernel, parameters), args = "batch_norm.cuh", BATCH_NORM[stem], "BnArgs"
    instance = f"template __global__ void {kernel}({parameters}, const __grid_constant__ {args});"
    source = f"""#include "{header}"
    namespace resnet_fast::cuda {{ {instance.format(t=TYPES[dtype], i=i)} }}"""
    return source, FLAGS


@contextlib.contextmanager
def cuda_device(**options):
    """While open, the package's operators run the CUDA C++ kernels in the simulator; gives the device."""
    with simulated(find_cuda=find_cuda, **options) as device, backends.use("cuda"):
        yield device

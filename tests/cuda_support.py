"""The CUDA C++ kernels for the simulated device, by the names under which the launch seam knows them."""

import contextlib
import re
from pathlib import Path

from ptxsim.device import simulated

from resnet_fast import backends

SOURCES = Path(__file__).parent.parent / "kernels/csrc/cuda"
FLAGS = (f"-I{SOURCES}", "-std=c++20", "--expt-relaxed-constexpr")
TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}


def find_cuda(name):
    """Source and flags of one kernel: the explicit instance that the extension holds, too."""
    found = re.fullmatch(r"conv_bn_relu_fwd_kernel<(\w+), (\d+)>", name)
    if found is None:
        return None
    t, tile = TYPES[found[1]], found[2]
    source = f"""#include "conv_bn_relu.cuh"
    namespace resnet_fast::cuda {{
    template __global__ void conv_bn_relu_fwd_kernel<{t}, {tile}>(const {t}*, const {t}*, const float*, const float*,
        const {t}*, {t}*, float*, int*, const __grid_constant__ ConvArgs);
    }}"""
    return source, FLAGS


@contextlib.contextmanager
def cuda_device(**options):
    """While open, the package's operators run the CUDA C++ kernels in the simulator; gives the device."""
    with simulated(find_cuda=find_cuda, **options) as device, backends.use("cuda"):
        yield device

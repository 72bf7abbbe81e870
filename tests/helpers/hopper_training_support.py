"""The 3x3 training kernels of Hopper for the tests: their plans, asked of the header, and launches in the simulator."""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch
from ptxsim import Kernel
from ptxsim.compilers import compile_cuda

from .hopper_support import FLAGS, SOURCES, TYPES, Args

_PLANS = """
#include "cuda/hopper/training/plan.h"
using namespace resnet_fast::cuda;
extern "C" {
int tiles() { return kHaloTrainingTileCount; }
void tile(int i, int* out) {
  const HaloTile t = kHaloTrainingTiles[i];
  out[0] = t.positions, out[1] = t.warpgroups, out[2] = t.stages;
}
int plan(int i, HaloArgs a, int gradient, HaloArgs* args, int* blocks, int* threads, int* shared, int* pixels) {
  if (!supports_training(kHaloTrainingTiles[i], a, gradient)) return 0;
  const HaloPlan p = plan_halo_training(kHaloTrainingTiles[i], a, gradient);
  *args = p.args, *blocks = p.blocks, *threads = p.threads, *shared = p.shared, *pixels = tile_pixels(p.args);
  return p.shared <= kMaxShared;
}
}
"""


class Plan:
    def __init__(self, args, blocks, threads, shared, pixels):
        self.args, self.blocks, self.threads, self.shared, self.pixels = args, blocks, threads, shared, pixels
        self.parts = blocks // args.channel_blocks


@functools.cache
def _library():
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "plans.cpp"), Path(folder, "plans.so")
        source.write_text(_PLANS)
        command = ["g++", "-std=c++20", "-shared", "-fPIC", "-Wall", "-Werror", f"-I{SOURCES}", source, "-o", target]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(target))
    library.plan.argtypes = [ctypes.c_int, Args, ctypes.c_int, *[ctypes.c_void_p] * 5]
    return library


@functools.cache
def tiles() -> list[tuple[int, int, int]]:
    """Positions, warpgroups and stages of each."""
    out, found = (ctypes.c_int * 3)(), []
    for i in range(_library().tiles()):
        _library().tile(i, out)
        found.append(tuple(out))
    return found


def plan(tile, batch, height, width, channels, out_channels, relu=False, stride=1, gradient=False) -> Plan | None:
    given = Args(batch, height, width, channels, out_channels, stride, relu, splits=1)
    outs = (Args(), ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_int())
    if not _library().plan(tile, given, gradient, *map(ctypes.byref, outs)):
        return None
    return Plan(outs[0], *(v.value for v in outs[1:]))


def source(dtype, tile: int, chunk: int, stride: int = 1, gradient: bool = False) -> str:
    t = TYPES[dtype]
    if gradient:
        return f"""#include "cuda/hopper/training/conv_gradient.cuh"
        template __global__ void resnet_fast::cuda::conv_halo_gradient_kernel<{t}, {tile}, {chunk}>(
            const {t}*, const {t}*, const float*, const {t}*, const {t}*, const {t}*, const float*, const {t}*,
            const {t}*, const float*, const float*, {t}*, float*, const __grid_constant__ resnet_fast::cuda::HaloArgs);
        """
    return f"""#include "cuda/hopper/training/conv_stats.cuh"
    template __global__ void resnet_fast::cuda::conv_halo_stats_kernel<{t}, {tile}, {chunk}, {stride}>(
        const {t}*, const float*, const {t}*, const float*, {t}*, float*,
        const __grid_constant__ resnet_fast::cuda::HaloArgs);"""


@functools.cache
def compiled(dtype, tile: int, chunk: int, stride: int = 1, gradient: bool = False) -> Kernel:
    return Kernel(compile_cuda(source(dtype, tile, chunk, stride, gradient), *FLAGS))


def stats(tile, x, weight, scale_shift=None, relu=False, bias=None, stride=1, partial=True, seed=0, kernel=None):
    """x: [n, h, w, c], weight: [k, 3, 3, c]; gives y, its partial statistics and the simulator's report."""
    p = plan(tile, *x.shape, len(weight), relu, stride)
    assert p is not None
    y = torch.empty(len(x), p.args.out_height, p.args.out_width, len(weight), dtype=x.dtype)
    parts = torch.empty(p.parts, 2, len(weight)) if partial else None
    report = (kernel or compiled(x.dtype, tile, p.args.chunk, stride)).launch(
        (p.blocks,),
        p.threads,
        *(x, scale_shift, weight, bias, y, parts, bytes(p.args)),
        shared=p.shared,
        outputs=[y] if parts is None else [y, parts],
        names=("x", "scale_shift", "weight", "bias", "y", "partial"),
        seed=seed,
    )
    return y, parts, report


def gradient(
    tile, grad, weight, y=None, coefficients=None, residual=None, x=None, scale_shift=None, relu=False, ys=(), stats=(),
    partial=True, seed=0, kernel=None,
):  # fmt: skip
    """grad, y: [n, h, w, k], weight: [k, 3, 3, c], others [n, h, w, c]; gives dx, its partial sums and the report."""
    out_channels = weight.shape[3]
    p = plan(tile, *grad.shape, out_channels, relu, gradient=True)
    assert p is not None
    dx = torch.empty(*grad.shape[:3], out_channels, dtype=grad.dtype)
    parts = torch.empty(p.parts, 1 + len(ys), out_channels) if partial else None
    y1, y2 = [*ys, None, None][:2]
    stats1, stats2 = [*stats, None, None][:2]
    args = (grad, y, coefficients, weight, residual, x, scale_shift, y1, y2, stats1, stats2, dx, parts, bytes(p.args))
    names = ("grad", "y", "coefficients", "weight", "residual", "x", "scale_shift")
    names += ("y1", "y2", "stats1", "stats2", "dx", "partial")
    report = (kernel or compiled(grad.dtype, tile, p.args.chunk, gradient=True)).launch(
        (p.blocks,),
        p.threads,
        *args,
        shared=p.shared,
        outputs=[dx] if parts is None else [dx, parts],
        names=names,
        seed=seed,
    )
    return dx, parts, report

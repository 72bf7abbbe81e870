"""The 3x3 kernels of Hopper for the tests: their plans, asked of the header, and their launches in the simulator."""

import ctypes
import functools
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from ptxsim import Kernel
from ptxsim.compilers import compile_cuda

SOURCES = Path(__file__).parents[2] / "kernels/csrc"
FLAGS = (f"-I{SOURCES}", "-std=c++20", "--expt-relaxed-constexpr", "-arch=sm_90a")
TYPES = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}
_PLANS = """
#include "cuda/hopper/conv_halo_plan.h"
using namespace resnet_fast::cuda;
extern "C" {
int tiles() { return kHaloTileCount; }
void tile(int i, int* out) {
  const HaloTile t = kHaloTiles[i];
  out[0] = t.positions, out[1] = t.warpgroups, out[2] = t.stages;
}
int plan(int i, HaloArgs a, HaloArgs* args, long* blocks, int* threads, int* shared, long* partial, long* counters) {
  if (!supports(kHaloTiles[i], a)) return 0;
  const HaloPlan p = plan_halo(kHaloTiles[i], a);
  *args = p.args, *blocks = p.blocks, *threads = p.threads, *shared = p.shared;
  *partial = p.partial_floats, *counters = p.counters;
  return p.shared <= kMaxShared;
}
}
"""


class Args(ctypes.Structure):
    """HaloArgs."""

    _names = "batch height width channels out_channels stride relu out_height out_width "
    _names += "pitch lines images tiles chunk chunks channel_blocks splits"
    _fields_ = [(n, ctypes.c_int32) for n in _names.split()]
    _fields_ += [(n, ctypes.c_uint32) for n in ("pitch_inverse", "height_inverse")]


@dataclass(frozen=True)
class Plan:
    args: Args
    blocks: int
    threads: int
    shared: int
    partial: int
    counters: int


@functools.cache
def _library():
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "plans.cpp"), Path(folder, "plans.so")
        source.write_text(_PLANS)
        command = ["g++", "-std=c++20", "-shared", "-fPIC", "-Wall", "-Werror", f"-I{SOURCES}", source, "-o", target]
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(target))
    library.plan.argtypes = [ctypes.c_int, Args, *[ctypes.c_void_p] * 6]
    return library


@functools.cache
def tiles() -> list[tuple[int, int, int]]:
    """Positions, warpgroups and stages of each."""
    out, found = (ctypes.c_int * 3)(), []
    for i in range(_library().tiles()):
        _library().tile(i, out)
        found.append(tuple(out))
    return found


def plan(tile: int, batch, height, width, channels, out_channels, relu=True, splits=1, stride=1) -> Plan | None:
    given = Args(batch, height, width, channels, out_channels, stride, relu, splits=splits)
    outs = (Args(), ctypes.c_long(), ctypes.c_int(), ctypes.c_int(), ctypes.c_long(), ctypes.c_long())
    if not _library().plan(tile, given, *map(ctypes.byref, outs)):
        return None
    return Plan(outs[0], *(v.value for v in outs[1:]))


def source(dtype, tile: int, chunk: int, stride: int = 1) -> str:
    t = TYPES[dtype]
    return f"""#include "cuda/hopper/conv_halo.cuh"
    template __global__ void resnet_fast::cuda::conv_halo_fwd_kernel<{t}, {tile}, {chunk}, {stride}>(
        const {t}*, const {t}*, const float*, const float*, const {t}*, {t}*, float*, int*,
        const __grid_constant__ resnet_fast::cuda::HaloArgs);"""


@functools.cache
def compiled(dtype, tile: int, chunk: int, stride: int = 1) -> Kernel:
    return Kernel(compile_cuda(source(dtype, tile, chunk, stride), *FLAGS))


def run(tile, x, weight, scale, shift, residual=None, relu=True, splits=1, stride=1, seed=0, kernel=None):
    """x, residual: [n, h, w, c], weight: [k, 3, 3, c]; gives y and the simulator's report."""
    batch, height, width, channels = x.shape
    p = plan(tile, batch, height, width, channels, len(weight), relu, splits, stride)
    assert p is not None
    y = torch.empty(batch, p.args.out_height, p.args.out_width, len(weight), dtype=x.dtype)
    partial = torch.empty(p.partial) if p.partial else None
    counters = torch.zeros(p.counters, dtype=torch.int32) if p.counters else None
    args = (x, weight, scale, shift, residual, y, partial, counters, bytes(p.args))
    names = ("x", "weight", "scale", "shift", "residual", "y", "partial", "counters")
    scratch = [] if partial is None else [partial]
    report = (kernel or compiled(x.dtype, tile, p.args.chunk, stride)).launch(
        (p.blocks, p.args.splits),
        p.threads,
        *args,
        shared=p.shared,
        outputs=[y],
        scratch=scratch,
        names=names,
        seed=seed,
    )
    assert counters is None or not counters.any()
    return y, report

"""The instruction sets: capped by ATEN_CPU_CAPABILITY, and the 512-bit kernels on machines that cannot run them."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.processes import pytest_environment, run_pytest
from helpers.support import rms

from resnet_fast import backends

TESTS = Path(__file__).parents[1]
CSRC = TESTS.parent / "kernels/csrc"
CXX = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
# Unoptimised, which compiles in a fifth of the time: the templates' logic is tested here, what GCC makes of it in
# test_machine_code. -Wno-psabi: vectors that AVX2 passes in two halves stay inside of one file.
FLAGS = ["-std=c++17", "-O0", "-fPIC", "-Wno-psabi", "-mavx2", "-mfma", f"-I{CSRC}"]
SUITES = [
    *(f"ops/test_{name}.py" for name in ("conv_bn_relu", "conv_chain", "add_relu", "bf16")),
    "training/test_training_ops.py",
]


# Eager convolves with oneDNN, which has a cap of its own: errors are compared within one instruction set.
@pytest.mark.parametrize(("capability", "isa", "onednn"), [("default", "baseline", "SSE41"), ("avx2", "avx2", "AVX2")])
def test_the_suites_of_the_operators_on_lesser_instruction_sets(capability, isa, onednn):
    """Only what computes: errors and meta tensors are the same everywhere."""
    if isa == backends.isa():
        return  # this very run
    if isa == "avx2" and backends.isa() == "baseline":
        pytest.skip("this CPU has no AVX2")
    caps = {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": onednn}
    assert isa_under(pytest_environment(**caps)) == isa
    selection = "error_rule or exact or winograd or layouts or special or equals_eager or 36"
    selection += " or weight_gradient or ((conv_bn_stats or conv_backward) and bfloat16)"
    result = run_pytest("-q", "-x", "-k", selection, *SUITES, cwd=TESTS, **caps)
    assert result.returncode == 0, result.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 500


def isa_under(env):
    code = "import resnet_fast; print(resnet_fast.backends.isa())"
    return subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip()


@pytest.mark.parametrize("capability", ["nonsense", "", "avx512"])
def test_other_values_leave_the_best(capability):
    if os.environ.get("ATEN_CPU_CAPABILITY", capability) in (
        "nonsense",
        "",
        "avx512",
    ):  # else this run is capped itself
        assert isa_under({**os.environ, "ATEN_CPU_CAPABILITY": capability}) == backends.isa()


SHIM = r"""
#define RESNET_FAST_VECTOR_BYTES 64
#include "cpu/kernels/direct_conv.h"
#include "cpu/kernels/elementwise.h"
#include "cpu/kernels/winograd.h"
using namespace resnet_fast;

template <typename T>
static void direct(const T* input, const T* residual, T* output, const int64_t* offsets,
                   int pixels, const T* filter, const T* bias, const int64_t* sizes, const int64_t* run_offset) {
  ConvCall<T> call{};
  call.input = input, call.residual = residual, call.output = output;
  call.input_offset = offsets, call.residual_offset = call.output_offset = offsets + pixels;
  call.pixels = pixels, call.filter = filter, call.bias = bias;
  call.panel_end = sizes[0], call.out_vectors = sizes[1], call.panel_stride = sizes[2];
  call.run_offset = run_offset, call.runs = sizes[3], call.channels = sizes[4], call.block = sizes[5];
  call.relu = sizes[6];
  conv<T, 4, 5>(call);
}

extern "C" {
int lanes_float() { return Simd<float>::lanes; }
void direct_float(const float* a, const float* b, float* c, const int64_t* d, int e, const float* f, const float* g,
                  const int64_t* h, const int64_t* i) { direct(a, b, c, d, e, f, g, h, i); }
void direct_double(const double* a, const double* b, double* c, const int64_t* d, int e, const double* f,
                   const double* g, const int64_t* h, const int64_t* i) { direct(a, b, c, d, e, f, g, h, i); }
void add_relu_float(const float* a, const float* b, float* out, int64_t n) { add_relu(a, b, out, n); }

int64_t winograd_scratch(int channels, int tiles, int tiles_w, int group, int compact) {
  return WinogradScratch(channels, tiles, tiles_w, group, 2 * Simd<float>::lanes, compact).numel();
}
void winograd_float(const float* input, const float* residual, float* output, const float* filter, const float* bias,
                    float* scratch, const int64_t* s) {
  WinogradCall<float> call{};
  call.input = input, call.input_image = s[0], call.input_row = s[1], call.input_pixel = s[2];
  call.residual = residual, call.output = output;
  call.residual_image = call.output_image = s[3], call.residual_row = call.output_row = s[4];
  call.residual_pixel = call.output_pixel = s[5];
  call.height = s[6], call.width = s[7], call.tile_end = s[8];
  call.filter = filter, call.bias = bias, call.channels = s[9], call.panel_end = s[10], call.panel_group = s[11];
  call.out_vectors = s[12], call.panel_stride = s[13], call.compact = s[14], call.edge_tiles = s[15];
  call.relu = true, call.scratch = scratch;
  winograd<float, 3, 5, 1>(call);
}
}
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The 512-bit kernels, each vector in two halves: the same template logic, 16 lanes wide, on AVX2.

    Register tiles have fewer rows than setup.py's kernels (each number of rows is a template to compile), still with
    every remainder.
    """
    if "avx2" not in torch.backends.cpu.get_cpu_capability().lower() and backends.isa() == "baseline":
        pytest.skip("this CPU has no AVX2")
    assert CXX, "the tests need the compiler that built the extension"
    folder = tmp_path_factory.mktemp("wide")
    source, library = folder / "wide.cpp", folder / "wide.so"
    source.write_text(SHIM)
    subprocess.run([CXX, *FLAGS, "-shared", source, "-o", library], check=True)
    return ctypes.CDLL(library)


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def panels(filters, lanes):
    """[K, points, C] -> panels of [point, channel, output channel], two vectors wide, the last maybe one."""
    k = filters.shape[0]
    padded = -(-k // lanes) * lanes
    filters = np.concatenate([filters, np.zeros((padded - k, *filters.shape[1:]), filters.dtype)])
    return [filters[i : i + 2 * lanes].transpose(1, 2, 0) for i in range(0, padded, 2 * lanes)], padded


def reference(x, weight, bias, residual):
    """x with its halo, channels last, in float64 or wider."""
    wide_type = np.longdouble if x.dtype == np.float64 else np.float64
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(wide_type), weight.shape[2:], axis=(0, 1))
    y = np.einsum("hwcrs,kcrs->hwk", windows, weight.astype(wide_type)) + bias + residual
    return np.maximum(y, 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("channels", "k", "size", "kernel", "block"),
    [
        (3, 16, (5, 5), 3, 3),
        (16, 32, (7, 9), 3, 16),
        (17, 65, (4, 6), 3, 8),
        (40, 24, (1, 1), 1, 16),
        (5, 33, (13, 19), 1, 5),
    ],
)
def test_direct_kernels_of_16_lanes(wide, channels, k, size, kernel, block, dtype):
    rng, lanes = np.random.default_rng(0), 64 // np.dtype(dtype).itemsize
    height, width = size
    weight = rng.integers(-4, 5, (k, channels, kernel, kernel)).astype(dtype)
    x = rng.integers(-4, 5, (height + kernel - 1, width + kernel - 1, channels)).astype(dtype)
    bias, taps = rng.integers(-4, 5, k).astype(dtype), kernel * kernel
    parts = [
        panels(weight.transpose(0, 2, 3, 1).reshape(k, taps, channels)[:, :, begin : begin + block], lanes)[0]
        for begin in range(0, channels, block)
    ]
    padded = -(-k // lanes) * lanes
    filters = np.concatenate([p[i].ravel() for i in range(len(parts[0])) for p in parts])
    biases = np.concatenate([bias, np.zeros(padded - k, dtype)])
    residual = rng.integers(-4, 5, (height, width, padded)).astype(dtype)
    out = np.full((height, width, padded), np.nan, dtype)
    row = (width + kernel - 1) * channels
    pixels = [(h, w) for h in range(height) for w in range(width)]
    offsets = np.array([h * row + w * channels for h, w in pixels] + [(h * width + w) * padded for h, w in pixels])
    runs = np.array([r * row + s * channels for r in range(kernel) for s in range(kernel)])
    sizes = np.array([len(parts[0]), padded // lanes, taps * channels * 2 * lanes, taps, channels, block, 1])
    name = "direct_float" if dtype == np.float32 else "direct_double"
    assert len(pixels) <= 252  # kMaxPixels
    getattr(wide, name)(
        *map(pointer, (x, residual, out, offsets)),
        len(pixels),
        *map(pointer, (filters, biases, sizes, runs)),
    )
    exact = reference(x, weight, bias, residual[:, :, :k])
    assert np.array_equal(out[:, :, :k], exact.astype(dtype))


def winograd_matrix():
    """G of F(4x4, 3x3) at 0, +-2/3, +-3/2 and infinity, by its definition (Lavin and Gray 2015)."""
    points = [0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2]
    rows = [[p**j / np.prod([p - q for q in points if q != p]) for j in range(3)] for p in points]
    return np.array([*rows, [0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    ("channels", "k", "size", "group"),
    [
        (16, 32, (8, 8), 1),
        (3, 16, (5, 7), 1),
        (33, 80, (9, 6), 2),
        (64, 17, (4, 4), 3),
        (48, 40, (7, 7), 1),
        (16, 8, (11, 15), 1),
        (40, 48, (17, 13), 1),
    ],
)
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("edge_tiles", [False, True])
def test_winograd_kernels_of_16_lanes(wide, channels, k, size, group, compact, edge_tiles):
    """Against a direct convolution in float64, to 1e-6 of the result; eager's own error is a third of that."""
    rng, lanes = np.random.default_rng(0), 16
    height, width = size
    tiles_h, tiles_w = -(-height // 4), -(-width // 4)
    row_channels = -(-channels // lanes) * lanes
    x = np.zeros((4 * tiles_h + 2, 4 * tiles_w + 2, row_channels), np.float32)
    x[: height + 2, : width + 2, :channels] = rng.standard_normal((height + 2, width + 2, channels))
    weight = (rng.standard_normal((k, channels, 3, 3)) / (3 * channels**0.5)).astype(np.float32)
    g = winograd_matrix()
    points = np.einsum("ir,kcrs,js->kijc", g, weight.astype(np.float64), g).reshape(k, 36, channels)
    if compact:  # [channel, tap, output channel], panel by panel; the kernel transforms them itself
        group = 1
        parts, padded = panels(weight.reshape(k, channels, 9).transpose(0, 2, 1), lanes)
        parts = [part.transpose(1, 0, 2) for part in parts]
    else:
        parts, padded = panels(points.astype(np.float32), lanes)
    filters = np.concatenate([p.ravel() for p in parts])
    bias = np.concatenate([rng.standard_normal(k), np.zeros(padded - k)]).astype(np.float32)
    residual = rng.standard_normal((height, width, padded)).astype(np.float32)
    out = np.full((height, width, padded), np.nan, np.float32)
    tiles = tiles_h * tiles_w
    wide.winograd_scratch.restype = ctypes.c_int64
    scratch = np.full(wide.winograd_scratch(channels, tiles, tiles_w, group, compact), np.nan, np.float32)
    row = x.shape[1] * row_channels
    sizes = [x.size, row, row_channels, out.size, width * padded, padded, height, width, tiles]
    sizes += [
        channels,
        len(parts),
        group,
        padded // lanes,
        (9 if compact else 36) * channels * 2 * lanes,
        compact,
        edge_tiles,
    ]
    wide.winograd_float(*map(pointer, (x, residual, out, filters, bias, scratch, np.array(sizes))))
    exact = reference(x[: height + 2, : width + 2, :channels], weight, bias[:k], residual[:, :, :k])
    assert rms(out[:, :, :k] - exact) <= 1e-6 * rms(exact)


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 100])
def test_add_relu_of_16_lanes(wide, n):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(n).astype(np.float32) for _ in range(2))
    a[n // 2 :: 3] = np.nan
    out = np.full(n + 1, 7.0, np.float32)
    wide.add_relu_float(pointer(a), pointer(b), pointer(out), ctypes.c_int64(n))
    assert np.array_equal(out[:n], np.maximum(a + b, 0), equal_nan=True)
    assert out[n] == 7

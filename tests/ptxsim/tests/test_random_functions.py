"""Random integer and float functions: the same C text through nvcc and the simulator, and natively through g++."""

import ctypes
import pathlib
import random
import subprocess

import numpy as np

from ptxsim import Kernel
from ptxsim.compilers import compile_cuda
from ptxsim.tests.test_instructions import floats

INTEGERS = {
    "int": "i4",
    "unsigned": "u4",
    "long long": "i8",
    "unsigned long long": "u8",
    "short": "i2",
    "unsigned char": "u1",
}


def expression(g, depth, names, is_float):
    if depth == 0:
        constant = (
            f"{g.choice([0.5, 2.0, -1.25, 3.0])}f" if is_float else str(g.choice([1, 2, 3, 7, 31, 255, 65537, -5]))
        )
        return g.choice([*names, *names, constant])
    a, b, c = (expression(g, depth - 1, names, is_float) for _ in range(3))
    if is_float:
        return g.choice(
            [
                f"({a} + {b})",
                f"({a} - {b})",
                f"({a} * {b})",
                f"({a} / {b})",
                f"sqrtf(fabsf({a}))",
                f"fmaf({a}, {b}, {c})",
                f"({a} < {b} ? {b} : {c})",
                f"(float)((double){a} * {b})",
                f"floorf({a})",
                f"fminf({a}, {b})",
                f"-({a})",
            ]
        )
    return g.choice(
        [
            f"({a} + {b})",
            f"({a} - {b})",
            f"({a} * {b})",
            f"({a} ^ {b})",
            f"({a} & {b})",
            f"({a} | {b})",
            f"({a} << ({b} & 15))",
            f"({a} >> ({b} & 15))",
            f"({a} / ({b} | 1))",
            f"({a} % ({b} | 1))",
            f"({a} < {b} ? {a} : {c})",
            f"~{a}",
            f"(long long)(int)({a})",
            f"(unsigned char)({a})",
            f"(int)(((long long){a} * {b}) >> 32)",
            f"({a} == {b} || {b} > {c})",
        ]
    )


def test_random_functions_against_gxx(tmp_path):
    g = random.Random(20)
    functions = []
    for k in range(60):
        is_float = k % 3 == 2
        types = ["float"] * 3 if is_float else [g.choice(list(INTEGERS)) for _ in range(3)]
        result = "float" if is_float else g.choice(list(INTEGERS))
        functions.append((f"f{k}", result, types, expression(g, 4, ["x", "y", "z"], is_float)))
    args = lambda ts: ", ".join(f"{t} {n}" for t, n in zip(ts, "xyz", strict=True))  # noqa: E731
    body = "".join(f"DEVICE {r} {n}({args(t)}) {{ return {e}; }}\n" for n, r, t, e in functions)
    device = "#define DEVICE static __device__\n" + body
    host = "#include <math.h>\n#define DEVICE static\n" + body
    for n, r, t, _ in functions:
        loop = f"(const {t[0]}* x, const {t[1]}* y, const {t[2]}* z, {r}* out, int n)"
        device += f'extern "C" __global__ void k_{n}{loop} {{\n  int i = blockIdx.x * blockDim.x + threadIdx.x;\n'
        device += f"  if (i < n) out[i] = {n}(x[i], y[i], z[i]);\n}}\n"
        host += f'extern "C" void k_{n}{loop} {{ for (int i = 0; i < n; ++i) out[i] = {n}(x[i], y[i], z[i]); }}\n'
    source = tmp_path / "host.cpp"
    source.write_text(host)
    command = "g++ -w -O1 -fwrapv -ffp-contract=off -shared -fPIC"
    subprocess.run([*command.split(), str(source), "-o", str(tmp_path / "host.so")], check=True)
    library = ctypes.CDLL(str(pathlib.Path(tmp_path, "host.so")))
    ptx = compile_cuda(device, "-fmad=false", "-diag-suppress=186")
    data = np.random.default_rng(8)
    n = 300
    for name, result, types, text in functions:

        def make(t):
            return (
                floats(n, 9)
                if t == "float"
                else data.integers(np.iinfo(INTEGERS[t]).min, np.iinfo(INTEGERS[t]).max, n, INTEGERS[t], True)
            )

        inputs = [make(t) for t in types]
        for x in inputs:
            x[100:200] = np.arange(100) if x.dtype.kind != "f" else np.linspace(-9, 9, 100, dtype="f")
        dtype = "f4" if result == "float" else INTEGERS[result]
        expected, got = np.empty(n, dtype), np.empty(n, dtype)
        getattr(library, f"k_{name}")(*(ctypes.c_void_p(a.ctypes.data) for a in (*inputs, expected)), n)
        Kernel(ptx, f"k_{name}").launch(3, 128, *inputs, got, n, outputs=[got])
        assert np.array_equal(got, expected, equal_nan=dtype == "f4"), f"{name}: {text}"

"""Kernels compiled by nvcc against numpy."""

import pathlib
import struct
import sys

import numpy as np
import pytest
import torch

from ptxsim import Kernel, compilers
from ptxsim.compilers import compile_cuda

SOURCE = pathlib.Path(__file__).with_name("cuda_kernels.cu").read_text()
rng = np.random.default_rng


@pytest.fixture(scope="module")
def ptx():
    return compile_cuda(SOURCE)


@pytest.mark.parametrize("n", [1, 31, 128, 1000])
def test_tail(ptx, n):
    x, y = rng(0).standard_normal(n).astype("f"), np.empty(n, "f")
    report = Kernel(ptx, "scale").launch(-(-n // 128), 128, x, y, n, np.float32(1.5), outputs=[y])
    assert np.array_equal(y, np.float32(1.5) * x)
    assert report.buffers["arg0"] == {"bytes": 4 * n, "read": 4 * n, "written": 0}
    assert report.divergent_branches == (n % 32 != 0)


def test_struct_by_value_and_switch(ptx):
    x, y = rng(0).standard_normal(500).astype("f"), np.empty(500, "f")
    Kernel(ptx, "by_value").launch(4, 128, x, y, 500, struct.pack("4fdh6x", 1, 2, 3, 4, 0.5, 1), outputs=[y])
    v = x * np.tile(np.float32([1, 2, 3, 4]), 125)
    kind = 1 + np.arange(500) % 7
    f = [lambda v: v + 1, lambda v: v * 3, lambda v: -v, lambda v: np.maximum(v, 0), lambda v: v - 7, lambda v: v * v]
    e = np.where(kind > 5, np.float32(0.5) * v, np.select([kind == k for k in range(6)], [g(v) for g in f]))
    np.testing.assert_allclose(y, e + np.float32(0.5), rtol=2.0**-22)  # fused or not: two roundings apart


def test_half2(ptx):
    x, y = rng(0).standard_normal((2, 2048)).astype("e")
    out = np.empty_like(x)
    Kernel(ptx, "half2_relu").launch(8, 128, x, y, out, 1024, outputs=[out])
    # products of two halves plus a half are exact in double: one rounding, as the fma has
    assert np.array_equal(out, np.maximum(x.astype("d") * y + 0.25, 0).astype("e"))


def test_bfloat2(ptx):
    x, y = torch.randn(2, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.empty_like(x)
    Kernel(ptx, "bfloat2_norm").launch(8, 128, x, y, out, 1024, outputs=[out])
    assert torch.equal(
        out, torch.maximum((x.double() * y.double() + 0.5).bfloat16(), (x.double() - y.double()).bfloat16())
    )


def test_block_sum(ptx):
    x, out = rng(0).integers(-50, 50, (5, 777)).astype("f"), np.empty(5, "f")
    Kernel(ptx, "block_sum").launch(5, 256, x, out, 777, outputs=[out])
    assert np.array_equal(out, x.sum(1))


def test_votes_and_partial_collectives(ptx):
    x = rng(0).integers(-5, 6, 64).astype(np.int32)
    x[3] = 101
    before, same, total = np.empty(64, np.int32), np.empty(64, np.uint32), np.zeros(2, np.int32)
    Kernel(ptx, "ballots").launch(1, 64, x, before, same, total, outputs=[before, same])
    w = x.reshape(2, 32)
    assert np.array_equal(before.reshape(2, 32), np.cumsum(w > 0, 1) - (w > 0))
    assert same.tolist() == [sum(1 << j for j in range(32) if w[i // 32, j] == w[i // 32, i % 32]) for i in range(64)]
    mirrored = [w[r, i] for r in range(2) for i in range(7) if w[r, i] == w[r, 6 - i]]
    assert total.tolist() == [w[0].sum(), max(0, *mirrored)]


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (70, 45)])
def test_transpose(ptx, rows, columns):
    x = rng(0).standard_normal((rows, columns)).astype("f")
    y = np.empty((columns, rows), "f")
    report = Kernel(ptx, "transpose").launch(
        (-(-columns // 32), -(-rows // 32)), (32, 8), x, y, rows, columns, outputs=[y]
    )
    assert np.array_equal(y, x.T)
    assert report.conflicts() == []  # the padding's purpose


def test_doubles_and_device_functions(ptx):
    x = rng(0).standard_normal(200)
    y = np.empty_like(x)
    Kernel(ptx, "doubles").launch(2, 128, x, y, 200, outputs=[y])
    s, t = np.zeros(200), np.ones(200)
    for k in range(1, 21):
        s, t = s + t, t * (x / k)
    np.testing.assert_allclose(y, s + np.sqrt(abs(x)) / (1 + x * x), rtol=1e-14)


def test_division_of_128_bits(ptx):
    g, kernel = rng(0), Kernel(ptx, "divide128")
    for _ in range(150):
        x = int.from_bytes(g.bytes(16), "big") >> int(g.integers(0, 100))
        y = max(1, int.from_bytes(g.bytes(16), "big") >> int(g.integers(0, 126)))
        a, q = np.array([x >> 64, x % 2**64, y >> 64, y % 2**64], np.uint64), np.empty(2, np.uint64)
        kernel.launch(1, 1, a, q, outputs=[q])
        assert (int(q[0]) << 64) + int(q[1]) == x // y


def test_tables(ptx):
    kernel = Kernel(ptx, "tables")
    x = np.float32([0.5, 3e5, -7e8, 1e30, 2, 123456.7])
    expected = np.float32([1, -2, 3, -4, 5, 1]) * np.sin(x.astype("d"))
    for uses in (7, 8):  # __device__ variables keep their values between launches
        y = np.empty(6, "f")
        kernel.launch(1, 32, x, y, 6)
        expected_now = expected + np.float32([uses, 0, 0, 0, 0, 0])
        np.testing.assert_allclose(y, expected_now, rtol=2.0**-21)


def test_atomics(ptx):
    x = rng(0).integers(0, 500, 64).astype(np.int32)
    out, wide = np.zeros(12, np.int32), np.zeros(3, np.uint64)
    halves, total = np.zeros(2, "e"), np.zeros(1)
    out[4] = 1000
    Kernel(ptx, "atomics").launch(2, 32, x, out, wide, halves, total)
    for block in (0, 1):
        v = x[32 * block :][:32]
        cleared = np.bitwise_and.reduce(~(np.uint32(1) << (v % 32).astype(np.uint32)))
        assert out[6 * block :][:4].view(np.uint32).tolist() == [v.sum(), v.max(), 32, cleared]
    bits = np.bitwise_xor.reduce(np.uint64(1) << (x % 64).astype(np.uint64))
    assert wide.tolist() == [int(x.sum()) << 20, int(x.max()) ** 2, bits]
    assert halves.tolist() == [64, 32]
    assert total[0] == x.sum() / 8
    assert out[4] == x.min()
    assert out[5] == (-64) % 10  # counts down from 0 through 9


def test_compare_and_swap(ptx):
    x, out = abs(rng(0).standard_normal(3000)).astype("f"), np.zeros(3, "f")
    Kernel(ptx, "cas_max").launch(24, 128, x, out, 3000, seed=5)
    assert np.array_equal(out, [x[k::3].max() for k in range(3)])


@pytest.mark.parametrize("seed", range(3))
def test_named_barriers(ptx, seed):
    x, y = rng(0).integers(0, 99, (5, 64)).astype(np.int32), np.empty((5, 64), np.int32)
    Kernel(ptx, "named_barriers").launch(1, 128, x, y, 5, outputs=[y], seed=seed)
    assert np.array_equal(y, x[:, ::-1])


@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 32), (100, 72, 200)])
def test_gemm(ptx, m, n, k):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randint(-4, 5, (m, k), generator=g).bfloat16(), torch.randint(-4, 5, (n, k), generator=g).bfloat16()
    c = torch.empty(m, n)
    report = Kernel(ptx, "gemm").launch((-(-m // 64), -(-n // 64)), 128, a, b, c, m, n, k, shared=16384, outputs=[c])
    assert torch.equal(c, a.float() @ b.float().T)
    assert report.conflicts() == []  # the swizzle's purpose


def test_wmma(ptx):
    a, b = rng(0).integers(-3, 4, (16, 64)).astype("e"), rng(1).integers(-3, 4, (16, 64)).astype("e")
    c = np.empty((16, 16), "f")
    Kernel(ptx, "wmma_f16").launch(1, 32, a, b, c, 64, outputs=[c])
    assert np.array_equal(c, np.maximum(a.astype("f") @ b.astype("f").T + 1, 0))


def test_wmma_other_shape_and_layout(ptx):
    a, b = torch.randint(-3, 4, (16, 32)).bfloat16(), torch.randint(-3, 4, (16, 8)).bfloat16()
    c = torch.empty(8, 32)
    Kernel(ptx, "wmma_bf16").launch(1, 32, a, b, c, outputs=[c])
    assert torch.equal(c, (a.float().T @ b.float()).T)


def test_nvcc_of_the_wheels_is_found(monkeypatch, tmp_path):
    """Where there is no toolkit, the compiler that PyPI's wheels unpack into site-packages."""
    wheel = tmp_path / "nvidia/cu13/bin/nvcc"
    wheel.parent.mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(compilers, "TOOLKIT", str(tmp_path / "no toolkit"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert compilers.nvcc() != str(wheel)
    wheel.write_text("")
    assert compilers.nvcc() == str(wheel)
    monkeypatch.setenv("PATH", str(wheel.parent))
    wheel.chmod(0o755)
    assert compilers.nvcc() == str(wheel)

# ruff: noqa: N803 (constants and dimensions of kernels are capitals)
"""Triton kernels the simulator is tested with: what fused convolutions, norms and elementwise kernels are made of."""

import triton
import triton.language as tl


@triton.jit
def add_relu(x, y, out, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    m = o < n
    v = tl.load(x + o, m) + tl.load(y + o, m)
    tl.store(out + o, tl.where(v > 0, v, 0.0).to(out.dtype.element_ty), m)


@triton.jit
def softmax(x, y, n, B: tl.constexpr):
    row = tl.program_id(0)
    o = tl.arange(0, B)
    m = o < n
    v = tl.load(x + row * n + o, m, -float("inf")).to(tl.float32)
    v = tl.exp(v - tl.max(v, 0))
    tl.store(y + row * n + o, (v / tl.sum(v, 0)).to(y.dtype.element_ty), m)


@triton.jit
def matmul(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    om = tl.program_id(0) * BM + tl.arange(0, BM)
    on = tl.program_id(1) * BN + tl.arange(0, BN)
    ok = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        ta = tl.load(
            a + om[:, None] * K + (k + ok)[None, :], mask=(om[:, None] < M) & ((k + ok)[None, :] < K), other=0.0
        )
        tb = tl.load(
            b + (k + ok)[:, None] * N + on[None, :], mask=(on[None, :] < N) & ((k + ok)[:, None] < K), other=0.0
        )
        acc = tl.dot(ta, tb, acc)
    tl.store(c + om[:, None] * N + on[None, :], acc.to(c.dtype.element_ty), mask=(om[:, None] < M) & (on[None, :] < N))


@triton.jit
def conv3x3(
    x, w, bias, out, batch, H, W, C: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr
):
    """NHWC implicit GEMM, padding 1, filters [3, 3, C, K], bias and ReLU in the epilogue."""
    p = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BN + tl.arange(0, BN)
    n, y, z = p // (H * W), p // W % H, p % W
    acc = tl.zeros((BM, BN), tl.float32)
    for t in range(9 * (C // BC)):
        tap = t // (C // BC)
        c = t % (C // BC) * BC + tl.arange(0, BC)
        yy, zz = y + tap // 3 - 1, z + tap % 3 - 1
        inside = (yy >= 0) & (yy < H) & (zz >= 0) & (zz < W) & (n < batch)
        tx = tl.load(x + ((n * H + yy) * W + zz)[:, None] * C + c[None, :], mask=inside[:, None], other=0.0)
        tw = tl.load(w + (tap * C + c)[:, None] * K + k[None, :], mask=k[None, :] < K, other=0.0)
        acc = tl.dot(tx, tw, acc)
    acc += tl.load(bias + k, k < K, 0.0)[None, :]
    acc = tl.maximum(acc, 0.0)
    tl.store(
        out + p[:, None] * K + k[None, :], acc.to(out.dtype.element_ty), mask=(n < batch)[:, None] & (k < K)[None, :]
    )


@triton.jit
def channel_moments(x, mean, var, P, C, BP: tl.constexpr, BC: tl.constexpr):
    """Per-channel mean and biased variance of [P, C]."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    s = tl.zeros((BC,), tl.float32)
    q = tl.zeros((BC,), tl.float32)
    for start in range(0, P, BP):
        p = start + tl.arange(0, BP)
        v = tl.load(x + p[:, None] * C + c[None, :], mask=(p < P)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        s += tl.sum(v, 0)
        q += tl.sum(v * v, 0)
    m = s / P
    tl.store(mean + c, m, c < C)
    tl.store(var + c, q / P - m * m, c < C)


@triton.jit
def histogram(x, counts, total, n, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    m = o < n
    v = tl.load(x + o, m, 0)
    tl.atomic_add(counts + v, 1, m)
    tl.atomic_max(total, tl.max(v, 0))


@triton.jit
def split_sum(x, partial, count, out, n, PARTS: tl.constexpr, B: tl.constexpr):
    """Each block sums a part; the last to finish sums the parts."""
    i = tl.program_id(0)
    o = i * B + tl.arange(0, B)
    tl.store(partial + i, tl.sum(tl.load(x + o, o < n, 0.0), 0))
    if tl.atomic_add(count, 1, sem="acq_rel") == PARTS - 1:
        tl.store(out, tl.sum(tl.load(partial + tl.arange(0, PARTS)), 0))


@triton.jit
def scan_rows(x, y, n, B: tl.constexpr):
    row = tl.program_id(0)
    o = tl.arange(0, B)
    v = tl.load(x + row * n + o, o < n, 0)
    tl.store(y + row * n + o, tl.cumsum(v, 0), o < n)

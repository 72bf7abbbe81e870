"""mma of every shape and type by PTX's fragment layouts; ldmatrix, stmatrix, mbarrier, barriers with results."""

import numpy as np
import pytest
import torch

from ptxsim import Fault, Kernel

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"


def per_thread(body, *buffers, shared=0, outputs=(), threads=32, **options):
    """A kernel whose parameters p0, p1, ... point 16 bytes a thread apart: %a0, %a1, ... hold each thread's place."""
    params = ", ".join(f".param .u64 p{k}" for k in range(len(buffers)))
    start = "".join(f"ld.param.u64 %a{k}, [p{k}];\nmad.wide.u32 %a{k}, %t, 16, %a{k};\n" for k in range(len(buffers)))
    text = (
        f"{HEAD}.extern .shared .align 128 .b8 sm[];\n.visible .entry k({params})\n{{\n"
        f".reg .b64 %a<{max(1, len(buffers))}>, %w<8>;\n.reg .b32 %t, %r<40>;\n.reg .pred %p<8>;\n"
        f"mov.u32 %t, %tid.x;\n{start}{body}\nret;\n}}\n"
    )
    return Kernel(text).launch(1, threads, *buffers, shared=shared, outputs=outputs, **options)


def fragment_index(matrix, shape_k, tf32, lane, e):
    """(row, column) of element e that a lane holds, as the PTX manual's figures have it."""
    g, t = lane // 4, lane % 4
    per = 1 if tf32 else 2  # elements in a register
    r, low = e // per, e % per
    if matrix == "a":
        return g + 8 * (r % 2), (t + 4 * (r // 2)) if tf32 else t * 2 + low + 8 * (r // 2)
    if matrix == "b":
        return (t + 4 * r) if tf32 else t * 2 + low + 8 * r, g
    return g + 8 * (e // 2), t * 2 + e % 2


def spread(m, matrix, k, tf32):
    count = {"a": 16 * k, "b": 8 * k, "c": 128}[matrix] // 32
    out = np.zeros((32, count), m.dtype)
    for lane in range(32):
        for e in range(count):
            out[lane, e] = m[fragment_index(matrix, k, tf32, lane, e)]
    return out


def bits(x, kind):
    if kind == "bf16":
        return torch.from_numpy(x.astype("f")).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return x.astype("e" if kind == "f16" else "f")


def padded(x):
    raw = np.zeros((32, 16), np.uint8)
    b = np.ascontiguousarray(x).view(np.uint8).reshape(32, -1)
    raw[:, : b.shape[1]] = b
    return raw


@pytest.mark.parametrize(
    ("k", "kind", "acc"),
    [
        (16, "f16", "f32"),
        (16, "f16", "f16"),
        (8, "f16", "f32"),
        (8, "f16", "f16"),
        (16, "bf16", "f32"),
        (8, "bf16", "f32"),
        (8, "tf32", "f32"),
        (4, "tf32", "f32"),
    ],
)
def test_mma_layouts(k, kind, acc):
    g = np.random.default_rng(k)
    a, b, c = g.integers(-4, 5, (16, k)), g.integers(-4, 5, (k, 8)), g.integers(-4, 5, (16, 8))
    tf32 = kind == "tf32"
    ra, rb = (16 * k // 32) // (1 if tf32 else 2), (8 * k // 32) // (1 if tf32 else 2)
    rc = 2 if acc == "f16" else 4
    regs = lambda n, at: "{" + ", ".join(f"%r{at + i}" for i in range(n)) + "}"  # noqa: E731

    def load(n, at, p):
        return f"ld.global.v{n}.b32 {regs(n, at)}, [%a{p}];\n" if n > 1 else f"ld.global.b32 %r{at}, [%a{p}];\n"

    body = load(ra, 0, 0) + load(rb, 4, 1) + load(rc, 8, 2)
    body += f"mma.sync.aligned.m16n8k{k}.row.col.{acc}.{kind}.{kind}.{acc} "
    body += f"{regs(rc, 8)}, {regs(ra, 0)}, {regs(rb, 4)}, {regs(rc, 8)};\nst.global.v{rc}.b32 [%a3], {regs(rc, 8)};"
    out = np.zeros((32, 16), np.uint8)
    report = per_thread(
        body,
        padded(bits(spread(a, "a", k, tf32), kind)),
        padded(bits(spread(b, "b", k, tf32), kind)),
        padded(bits(spread(c, "c", k, False), acc)),
        out,
    )
    got = out[:, : 4 * rc].copy().view("e" if acc == "f16" else "f")
    assert np.array_equal(got, spread(a @ b + c, "c", k, False))
    assert report.mma_flops == {f"m16n8k{k}": 2 * 16 * 8 * k}


def test_mma_in_a_divergent_warp_is_a_fault():
    body = "setp.lt.u32 %p0, %t, 16;\n@%p0 bra $skip;\n"
    body += "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r0,%r1,%r2,%r3}, {%r4,%r5,%r6,%r7}, {%r8,%r9}, "
    body += "{%r0,%r1,%r2,%r3};\n$skip:\nbar.sync 0;"
    with pytest.raises(Fault) as caught:
        per_thread(body)
    assert caught.value.kind == "divergence"


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_and_stmatrix(trans):
    """stmatrix into shared memory, ldmatrix back: the fragments return; with .trans on the load, transposed."""
    x = np.random.default_rng(0).integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    frag = np.ascontiguousarray(x.reshape(4, 32, 2).transpose(1, 0, 2))  # lane, matrix, pair
    out = np.zeros((32, 16), np.uint8)
    body = (
        "ld.global.v4.b32 {%r0,%r1,%r2,%r3}, [%a0];\nmov.b32 %r4, sm;\nmad.lo.u32 %r4, %t, 16, %r4;\n"
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r4], {%r0,%r1,%r2,%r3};\nbar.warp.sync -1;\n"
        f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r5,%r6,%r7,%r8}}, [%r4];\n"
        "st.global.v4.b32 [%a1], {%r5,%r6,%r7,%r8};"
    )
    report = per_thread(body, padded(frag), out, shared=512)
    expected = x.transpose(0, 2, 1) if trans else x
    assert np.array_equal(out.view(np.uint16).reshape(32, 4, 2).transpose(1, 0, 2).reshape(4, 8, 8), expected)
    assert report.wavefronts == (8, 8)


def test_ldmatrix_bank_conflicts_are_counted():
    """Rows 128 bytes apart share their banks: eight wavefronts for each matrix instead of one."""
    body = (
        "mov.b32 %r4, sm;\nmad.lo.u32 %r4, %t, 128, %r4;\nmov.b32 %r0, 0;\n"
        + "".join(f"st.shared.v4.b32 [%r4+{16 * j}], {{%r0,%r0,%r0,%r0}};\n" for j in range(8))
        + "bar.sync 0;\nldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r5,%r6,%r7,%r8}, [%r4];"
    )
    report = per_thread(body, shared=4096)
    row = next(r for r in report.rows if "ldmatrix" in r.text)
    assert (row.units, row.ideal) == (32, 4)


MBARRIER = """
mov.b32 %r0, sm;
setp.ne.u32 %p0, %t, 0;
@%p0 bra $wait_init;
mbarrier.init.shared.b64 [%r0], 64;
$wait_init:
bar.sync 0;
mad.lo.u32 %r1, %t, 16, %r0;
add.u32 %r1, %r1, 128;
{copy}
{arrive}
$spin:
mbarrier.test_wait.parity.shared.b64 %p1, [%r0], %r9;
{test}
xor.b32 %r2, %t, 33;
mad.lo.u32 %r2, %r2, 16, %r0;
ld.shared.v4.b32 {{%r3,%r4,%r5,%r6}}, [%r2+128];
st.global.v4.b32 [%a1], {{%r3,%r4,%r5,%r6}};
"""
COPY = "cp.async.cg.shared.global [%r1], [%a0], 16;"
ARRIVE = "cp.async.mbarrier.arrive.noinc.shared.b64 [%r0];"
STORE = "ld.global.v4.b32 {%r3,%r4,%r5,%r6}, [%a0];\nst.shared.v4.b32 [%r1], {%r3,%r4,%r5,%r6};"
TEST = "@!%p1 bra $spin;"


@pytest.mark.parametrize(("copy", "arrive"), [(COPY, ARRIVE), (STORE, "mbarrier.arrive.shared.b64 %w0, [%r0];")])
@pytest.mark.parametrize("seed", range(3))
def test_mbarrier(copy, arrive, seed):
    x, y = np.random.default_rng(0).integers(0, 256, (2, 64, 16)).astype(np.uint8)
    body = "mov.b32 %r9, 0;\n" + MBARRIER.format(copy=copy, arrive=arrive, test=TEST)
    per_thread(body, x, y, shared=2048, threads=64, outputs=[y], seed=seed)
    assert np.array_equal(y, x[np.arange(64) ^ 33])


@pytest.mark.parametrize(("copy", "arrive"), [(COPY, ARRIVE), (STORE, "mbarrier.arrive.shared.b64 %w0, [%r0];")])
def test_mbarrier_that_nobody_waits_for(copy, arrive):
    x, y = np.zeros((2, 64, 16), np.uint8)
    with pytest.raises(Fault) as caught:
        per_thread(
            "mov.b32 %r9, 0;\n" + MBARRIER.format(copy=copy, arrive=arrive, test=""), x, y, shared=2048, threads=64
        )
    assert caught.value.kind in ("async", "race", "uninitialised")


@pytest.mark.parametrize("seed", range(2))
def test_barrier_reductions(seed):
    y = np.zeros((64, 4), np.uint32)
    body = (
        "setp.gt.u32 %p0, %t, 40;\nbar.red.popc.u32 %r0, 0, %p0;\n"
        "bar.red.or.pred %p1, 0, %p0;\nbar.red.and.pred %p2, 0, %p0;\n"
        "selp.b32 %r1, 1, 0, %p1;\nselp.b32 %r2, 1, 0, %p2;\nst.global.v4.b32 [%a0], {%r0,%r1,%r2,%r2};"
    )
    per_thread(body, y, threads=64, seed=seed)
    assert (y == [23, 1, 0, 0]).all()


def test_vector_width_and_state_spaces():
    """Every width of load and store, through generic addresses to global and shared memory alike."""
    x, y = np.random.default_rng(0).integers(0, 256, (2, 32, 16)).astype(np.uint8)
    body = (
        "mov.b32 %r0, sm;\ncvt.u64.u32 %w0, %r0;\ncvta.shared.u64 %w0, %w0;\nmad.wide.u32 %w0, %t, 16, %w0;\n"
        "ld.v2.b64 {%w1,%w2}, [%a0];\nst.v2.b64 [%w0], {%w1,%w2};\n"
        "ld.u8 %r1, [%w0+3];\nld.s8 %r2, [%w0+5];\nld.v2.u16 {%r3,%r4}, [%w0+8];\n"
        "st.b8 [%a1], %r1;\nst.u8 [%a1+1], 7;\nst.u16 [%a1+2], %r3;\n"
        "st.b32 [%a1+4], %r2;\nst.v2.b32 [%a1+8], {%r4,%r1};"
    )
    per_thread(body, x, y, shared=512, outputs=[y])
    w = x.view(np.uint16)
    assert np.array_equal(y[:, 0], x[:, 3])
    assert (y[:, 1] == 7).all()
    assert np.array_equal(y[:, 2:4].copy().view(np.uint16)[:, 0], w[:, 4])
    assert np.array_equal(y.view(np.int32)[:, 1], x[:, 5].view(np.int8))
    assert np.array_equal(y.view(np.uint32)[:, 2], w[:, 5])
    assert np.array_equal(y.view(np.uint32)[:, 3], x[:, 3])


def test_cache_policies_change_nothing():
    """Opcodes with "::" may open a statement; the policy they make goes to hints alone."""
    x, y = np.random.default_rng(0).integers(0, 256, (2, 32, 16)).astype(np.uint8)
    body = (
        "createpolicy.fractional.L2::evict_last.b64 %w0, 1.0;\n"
        "ld.global.L1::evict_last.L2::cache_hint.v4.b32 {%r0,%r1,%r2,%r3}, [%a0], %w0;\n"
        "st.global.L1::evict_first.v4.b32 [%a1], {%r0,%r1,%r2,%r3};"
    )
    per_thread(body, x, y, outputs=[y])
    assert np.array_equal(x, y)

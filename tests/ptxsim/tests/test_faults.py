"""Every planted fault is reported, with its kind and its place; deleting any needed barrier or wait is noticed."""

import pathlib
import re

import numpy as np
import pytest
import torch

from ptxsim import Fault, Kernel, PtxError
from ptxsim import triton_kernels as kernels
from ptxsim.compilers import compile_cuda, compile_triton

SOURCE = pathlib.Path(__file__).with_name("cuda_kernels.cu").read_text()

FAULTY = pathlib.Path(__file__).with_name("faulty_kernels.cu").read_text()
F = lambda n: np.zeros(n, "f")  # noqa: E731

# kernel: (kind, words of the message, grid, block, arguments by position, which of them are outputs)
PLANTED = {
    "shared_overrun": ("out-of-bounds", "shared", 1, 32, [F(32)], []),
    "misaligned": ("misaligned", "16-byte", 1, 8, [F(64), F(32)], []),
    "misaligned_shared": ("misaligned", "8-byte", 1, 32, [F(32)], []),
    "uninitialised": ("uninitialised", "shared", 1, 32, [F(32)], []),
    "reads_output": ("uninitialised", "arg0", 1, 32, [F(32)], [0]),
    "half_written": ("unwritten", "4 of 128 bytes", 1, 32, [F(32)], [0]),
    "warp_race": ("race", "same warp", 1, 32, [F(32)], []),
    "block_race": ("race", "warp", 1, 64, [F(64)], []),
    "write_after_read": ("race", "", 1, 64, [F(64)], []),
    "global_race": ("race", "at arg0", 1, 64, [F(64), F(64)], []),
    "global_write_after_read": ("race", "write over data read at arg0", 1, 96, [F(32), F(96)], []),
    "global_overwrite": ("race", "write over data written at arg0", 1, 64, [F(32)], []),
    "global_barrier_of_some": ("race", "at arg0", 1, 96, [F(96), F(96)], []),
    "global_atomic_after_store": ("race", "", 1, 64, [np.zeros(32, np.int32)], []),
    "unfenced_flag_of_a_warp": ("race", "not ordered after warp 0", 1, 64, [F(32), np.zeros(1, np.int32), F(32)], []),
    "half_warp_sync": ("race", "same warp", 1, 32, [F(32)], []),
    "async_too_early": ("async", "before its wait", 1, 32, [F(128), F(128)], []),
    "async_wrong_group": ("async", "before its wait", 1, 32, [F(128), F(128)], []),
    "async_uncommitted": ("async", "before its wait", 1, 32, [F(128), F(128)], []),
    "async_not_shared_with_others": ("race", "same warp", 1, 32, [F(128), F(128)], []),
    "reads_other_block": ("block-conflict", "", 2, 32, [F(64), F(64)], []),
    "overwrites_other_block": ("block-conflict", "overwrites data of", 2, 32, [F(32)], []),
    "overwrites_what_was_read": ("block-conflict", "", 2, 32, [F(32), F(64)], []),
    "read_only_cache": ("block-conflict", "nc", 1, 32, [F(32), F(32)], []),
    "missed_barrier": ("barrier", "exited", 1, 64, [F(64), 40], []),
    "divergent_barrier": ("barrier", "missed by 16 lanes", 1, 32, [F(32)], []),
    "crossed_barriers": ("deadlock", "32 of 64 threads", 1, 64, [F(64)], []),
    "absent_lane": ("divergence", "missed by 16 lanes", 1, 32, [F(32)], []),
    "endless": ("limit", "passed its limit", 1, 32, [np.zeros(1, np.int32)], []),
    "trapped": ("trap", "", 1, 32, [np.zeros(32, np.int32)], []),
    "atomic_then_plain": ("block-conflict", "", 2, 32, [np.zeros(1, np.int32), np.zeros(64, np.int32)], []),
    "unfenced_flag": (
        "block-conflict",
        "read of data written by block 0",
        2,
        32,
        [F(32), np.zeros(1, np.int32), F(32)],
        [],
    ),
}


@pytest.fixture(scope="module")
def faulty():
    return compile_cuda(FAULTY)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PLANTED)
def test_planted(faulty, name, seed):
    kind, words, grid, block, args, outputs = PLANTED[name]
    args = [a.copy() if isinstance(a, np.ndarray) else a for a in args]
    with pytest.raises(Fault) as caught:
        Kernel(faulty, name).launch(grid, block, *args, outputs=[args[k] for k in outputs], seed=seed, limit=10**6)
    fault = caught.value
    assert fault.kind == kind
    assert words in fault.text
    if kind not in ("unwritten", "limit"):
        body = FAULTY.split("__global__ void " + name + "(")[1].split("__global__")[0]
        first = FAULTY[: FAULTY.index("__global__ void " + name + "(")].count("\n") + 1
        line = int(re.search(r"kernel.cu:(\d+)", fault.source).group(1))
        assert first <= line <= first + body.count("\n")
        assert fault.line
        assert fault.instruction


@pytest.mark.parametrize("seed", range(8))
def test_flag_behind_a_fence_is_no_conflict(faulty, seed):
    data, flag, y = F(32), np.zeros(1, np.int32), F(32)
    Kernel(faulty, "fenced_flag").launch(2, 32, data, flag, y, outputs=[y], seed=seed, limit=10**6)
    assert (y == 1).all()


@pytest.mark.parametrize("seed", range(4))
def test_flag_of_a_warp_behind_a_fence_is_no_race(faulty, seed):
    data, flag, y = F(32), np.zeros(1, np.int32), F(32)
    Kernel(faulty, "fenced_flag_of_a_warp").launch(1, 64, data, flag, y, outputs=[y], seed=seed, limit=10**6)
    assert (y == 1).all()


def test_warps_exchange_through_global_memory(faulty):
    """Barriers of the block order it, and each is needed."""
    start = faulty.index(".visible .entry global_exchange(")
    body = faulty[: faulty.index(".visible")] + faulty[start : start + faulty[start:].index("\n}") + 3]

    def run(kernel):
        y = F(64)
        kernel.launch(1, 64, F(64), y, 3, outputs=[y])
        return np.array_equal(y, 2 + (np.arange(64) ^ 32))

    assert run(Kernel(body, "global_exchange"))
    assert survivors(body, r"^\s*bar\.sync.*$", "global_exchange", run) == []


def test_place_of_a_fault():
    ptx = compile_cuda(SOURCE)
    x, y = F(100), F(100)
    with pytest.raises(Fault) as caught:
        Kernel(ptx, "scale").launch(1, 128, x, y, 101, np.float32(1))
    fault = caught.value
    assert (fault.kind, fault.block, fault.thread) == ("out-of-bounds", [0, 0, 0], [100, 0, 0])
    assert "0 bytes past the end of arg0 (400 bytes)" in fault.text
    assert "ld.global" in fault.instruction


def test_adjacent_views_are_guarded():
    """Two halves of one workspace: running from the first into the second is out of bounds."""
    ptx = compile_cuda(SOURCE)
    work = torch.zeros(256)
    with pytest.raises(Fault, match="past the end of arg1"):
        Kernel(ptx, "scale").launch(1, 256, torch.ones(256), work[:128], 256, np.float32(1))


def test_null_pointer():
    with pytest.raises(Fault, match="null pointer"):
        Kernel(compile_cuda(SOURCE), "scale").launch(1, 32, None, F(32), 32, np.float32(1))


# Deleting what orders memory must be noticed, by a fault or at least by wrong results.
def deletions(ptx: str, pattern: str):
    for match in re.finditer(pattern, ptx, re.M):
        yield match.group(0).strip(), ptx[: match.start()] + "\n" * match.group(0).count("\n") + ptx[match.end() :]


def survivors(ptx, pattern, name, run):
    found, left = 0, []
    for what, mutant in deletions(ptx, pattern):
        found += 1
        try:
            if run(Kernel(mutant, name)):
                left.append((found, what))
        except Fault:
            pass
    assert found
    return left


def test_every_barrier_and_wait_of_the_gemm_is_needed():
    ptx = compile_cuda(SOURCE)
    body = ptx[ptx.index(".entry gemm(") :]
    body = ptx[: ptx.index(".visible")] + ".visible " + body[: body.index("\n}") + 3]
    a = torch.randint(-4, 5, (64, 160)).bfloat16()
    b = torch.randint(-4, 5, (64, 160)).bfloat16()

    def run(kernel):
        c = torch.empty(64, 64)
        kernel.launch((1, 1), 128, a, b, c, 64, 64, 160, shared=16384, outputs=[c])
        return torch.equal(c, a.float() @ b.float().T)

    assert run(Kernel(body, "gemm"))
    assert survivors(body, r"^\s*(bar\.sync|cp\.async\.wait_group).*$", "gemm", run) == []


@pytest.mark.parametrize("name", ["block_sum", "transpose", "wmma_f16"])
def test_every_barrier_is_needed(name):
    ptx = compile_cuda(SOURCE)
    body = ptx[ptx.index(f".entry {name}(") :]
    body = ptx[: ptx.index(".visible")] + ".visible " + body[: body.index("\n}") + 3]
    runs = {
        "block_sum": lambda k: k.launch(2, 256, np.ones((2, 777), "f"), F(2), 777),
        "transpose": lambda k: k.launch((2, 2), (32, 8), F((64, 64)), F((64, 64)), 64, 64),
        "wmma_f16": lambda k: k.launch(1, 32, np.ones((16, 64), "e"), np.ones((16, 64), "e"), F((16, 16)), 64),
    }
    assert survivors(body, r"^\s*bar\.(sync|warp\.sync).*$", name, runs[name]) == []


def triton_run(binary, bound, out, expected):
    values = [bound[n] for n in binary.passed]

    def run(kernel, grid=(1, 1)):
        kernel.launch(grid, binary.threads, *values, shared=binary.shared, outputs=[out])
        return torch.equal(out, expected)

    return run


@pytest.mark.parametrize(("stages", "warps"), [(1, 4), (2, 4), (3, 4), (3, 8)])
def test_barriers_and_waits_of_tritons_matmul(stages, warps):
    """Each run of waits, and each barrier, but those Triton emits for nothing: the wait and the barrier that open
    the pipelined loop repeat those that close it, and with two stages the last wait has nothing left to wait for."""
    a, b = torch.randint(-4, 5, (64, 160)).half(), torch.randint(-4, 5, (160, 64)).half()
    c = torch.empty(64, 64)
    binary, bound = compile_triton(
        kernels.matmul, a, b, c, 64, 64, 160, BM=64, BN=64, BK=32, num_stages=stages, num_warps=warps
    )
    run = triton_run(binary, bound, c, a.float() @ b.float())
    assert run(Kernel(binary.ptx))
    pattern = r"^\s*(bar\.sync.*|cp\.async\.wait_group.*(\n\s*(cp\.async\.wait_group|\.loc|//|\$L__tmp).*)*)$"
    assert len(survivors(binary.ptx, pattern, binary.name, run)) <= {1: 0, 2: 3, 3: 2}[stages]


def test_barriers_of_tritons_softmax():
    x, y = torch.randn(1, 1000), torch.empty(1, 1000)
    binary, bound = compile_triton(kernels.softmax, x, y, 1000, B=1024, num_warps=8)
    expected = torch.empty_like(y)
    Kernel(binary.ptx).launch(1, binary.threads, x, expected, 1000, shared=binary.shared)
    assert survivors(binary.ptx, r"^\s*bar\.sync.*$", binary.name, triton_run(binary, bound, y, expected)) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("frobnicate.b32 %r1, %r2;", "unknown instruction"),
        ("add.warm.s32 %r1, %r1, %r1;", "'.warm'"),
        ("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r1}, {%r1}, {%r1}, {%r1};", "unsupported shape"),
        ("cvt.rn.satfinite.e4m3x2.f32 %rs1, %r1, %r1;", "satfinite"),
        ("add.s64 %rd1, %r1, %rd1;", "wrong width"),
        ("mov.b32 %r1, %quux;", "unknown special register"),
        ("bra $nowhere;", "$nowhere"),
        ("call.uni (%r1), vprintf, (%rd1, %rd2);", "printf is not supported"),
    ],
)
def test_what_is_unknown_is_an_error(line, words):
    text = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k()\n{\n"
    text += f".reg .b32 %r<4>;\n.reg .b16 %rs<4>;\n.reg .b64 %rd<4>;\n{line}\nret;\n}}\n"
    with pytest.raises(PtxError) as caught:
        Kernel(text)
    assert words in str(caught.value)
    assert "line 9" in str(caught.value)

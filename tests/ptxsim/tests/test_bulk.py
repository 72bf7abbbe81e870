"""Bulk copies, mbarriers with transactions, warps in roles: results, and faults where an order is missing."""

import numpy as np
import pytest

from ptxsim import Fault, Kernel, PtxError
from ptxsim.hopper import compile_hopper, entry
from ptxsim.tests.test_faults import survivors

rng = np.random.default_rng
OTHER_WARPS = "mov.u32 %r1, %tid.x;\nsetp.ge.u32 %p1, %r1, 32;\n"


@pytest.fixture(scope="module")
def ptx():
    return compile_hopper()


def run_pipeline(kernel, rows=8, promised=512, seed=0):
    x, y = rng(0).standard_normal((rows, 128)).astype("f"), np.empty((rows, 128), "f")
    report = kernel.launch(1, 160, x, y, rows, promised, outputs=[y], seed=seed, limit=10**6)
    return np.array_equal(y, 2 * x), report


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows", [1, 3, 11])
def test_pipeline(ptx, rows, seed):
    exact, report = run_pipeline(Kernel(ptx, "pipeline"), rows, seed=seed)
    assert exact
    assert report.buffers["arg0"]["read"] == 512 * rows
    assert report.classes["async_copy"]["units"] == 16 * rows  # sectors


@pytest.mark.parametrize(("promised", "lacks"), [(528, "16 bytes"), (1024, "512 bytes")])
def test_wrong_number_of_bytes_is_a_deadlock(ptx, promised, lacks):
    with pytest.raises(Fault, match=f"deadlock: mbarrier .* 0 of 1 arrivals and {lacks}"):
        run_pipeline(Kernel(ptx, "pipeline"), promised=promised)


def test_too_few_bytes_end_a_phase_that_never_comes(ptx):
    """The copy brings more than was expected: the count is below zero, which ends no phase."""
    with pytest.raises(Fault, match=r"deadlock: mbarrier .* and -16 bytes"):
        run_pipeline(Kernel(ptx, "pipeline"), promised=496)


def test_every_wait_and_arrival_of_the_pipeline_is_needed(ptx):
    body = entry(ptx, "pipeline")
    assert run_pipeline(Kernel(body))[0]
    pattern = r"^.*(mbarrier\.(arrive|init)|fence\.proxy|bar\.sync|bra again|bra \$again).*$"
    # A wait may give up before its time is over or not: the seed says.
    exact = lambda kernel: all(run_pipeline(kernel, seed=seed)[0] for seed in range(6))  # noqa: E731
    assert survivors(body, pattern, "pipeline", exact) == []


def test_copy_over_stored_data(ptx):
    x, y = rng(0).standard_normal(128).astype("f"), np.empty(128, "f")
    body = entry(ptx, "overwritten")
    Kernel(body).launch(1, 128, x, y, outputs=[y])
    assert np.array_equal(x, y)
    with pytest.raises(Fault, match=r"async: bulk copy (over|on)"):
        Kernel(body.replace("fence.proxy.async.shared::cta;", "")).launch(1, 128, x, y)


def test_reader_that_does_not_wait(ptx):
    x, y = np.zeros(128, "f"), np.empty(128, "f")
    body = entry(ptx, "overwritten")
    # The phase is awaited by the first warp alone: the others read what no order has given them.
    hurried = body.replace("mbarrier.try_wait", f"{OTHER_WARPS}@%p1 bra past;\nmbarrier.try_wait")
    at = hurried.index("try_wait")
    end = hurried.index("}", at)
    hurried = hurried[:end] + "past:\n" + hurried[end:]
    with pytest.raises(Fault) as caught:
        Kernel(hurried).launch(1, 128, x, y)
    assert caught.value.kind in ("async", "race")


@pytest.mark.parametrize("size", [8, 520])
def test_sizes_are_multiples_of_16(ptx, size):
    body = entry(ptx, "overwritten")
    assert body.count(", 512;") == 1
    with pytest.raises(Fault, match="misaligned: bulk copies"):
        Kernel(body.replace(", 512;", f", {size};")).launch(1, 128, np.zeros(256, "f"), np.empty(128, "f"))


@pytest.mark.parametrize("seed", range(3))
def test_named_barriers_and_elected_lanes(ptx, seed):
    x, y, warps = rng(0).integers(0, 99, (5, 128)).astype(np.int32), np.empty((5, 128), np.int32), np.zeros(1, np.int32)
    Kernel(ptx, "roles").launch(1, 256, x, y, warps, 5, outputs=[y], seed=seed)
    assert np.array_equal(y, x[:, ::-1])
    assert warps[0] == 8


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("setmaxnreg.dec.sync.aligned.u32 20;", "multiple of 8"),
        ("wgmma.mma_async.sync.aligned.m64n12k16.f32.f16.f16 {%f0}, %rd1, %rd1, 1, 1, 1, 0, 0;", "unsupported shape"),
        ("wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%f0}, %rd1, %rd1, 1, 1, 1;", "unsupported shape"),
        ("wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.f16.f16 {%f0}, %rd1, %rd1, %r1, 0, 1, 1, 1;", "sparse"),
        ("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1}, %rd1, %rd1, 1, 1, 1, 0, 0;", "vector length"),
        ("cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], 16;", "destination is shared"),
        ("cp.async.bulk.tensor.1d.shared::cta.global.tile.bulk_group [%r1], [%rd1, {%r1}], [%r1];", "unreadable"),
    ],
)  # fmt: skip
def test_what_is_unknown_is_an_error(line, words):
    text = ".version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry k()\n{\n"
    text += f".reg .b32 %r<4>;\n.reg .f32 %f<4>;\n.reg .b64 %rd<4>;\n{line}\nret;\n}}\n"
    with pytest.raises(PtxError) as caught:
        Kernel(text)
    assert words in str(caught.value)

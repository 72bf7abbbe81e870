"""wgmma by nvcc: shapes, swizzles, majors, fragments in registers, against numpy."""

import numpy as np
import pytest

from ptxsim import Fault, Kernel
from ptxsim.hopper import accumulators, compile_hopper, entry, shared_image
from ptxsim.tests.test_faults import survivors

NUMPY = {"f16": np.float16, "bf16": np.uint16, "tf32": np.float32}


def integers(rows, k, kind, seed):
    """Small integers as float32, and as the bits of the type."""
    x = np.random.default_rng(seed).integers(-4, 5, (rows, k)).astype("f")
    return x, (x.view(np.uint32) >> 16).astype(np.uint16) if kind == "bf16" else x.astype(NUMPY[kind])


def launch(kernel, n, kind, swizzles=(16, 16), majors=(False, False), accumulate=True, seed=0):
    k = 8 if kind == "tf32" else 16
    (a, a_bits), (b, b_bits) = integers(64, k, kind, seed), integers(n, k, kind, seed + 1)
    a_image, a_desc = shared_image(a_bits, swizzles[0], majors[0])
    b_image, b_desc = shared_image(b_bits, swizzles[1], majors[1])
    start = np.random.default_rng(9).integers(-9, 9, (64, n)).astype("f")
    out = accumulators(start)
    pairs = a.astype(np.float32) if kind == "tf32" else a_bits.view(np.uint32)  # 32 bits a register: [64, 8]
    t = np.arange(128)[:, None]
    j = np.arange(4)
    fragments = np.ascontiguousarray(pairs[t // 32 * 16 + t % 32 // 4 + j % 2 * 8, t % 4 + j // 2 * 4])
    shared = len(a_image) + len(b_image) + 1024
    args = [a_image, b_image, len(a_image) // 16, len(b_image) // 16, a_desc, b_desc, accumulate, out, fragments]
    report = kernel.launch(1, 128, *args, shared=shared)
    return out, a, b, start * accumulate, report


def exact(*args, sign=1, **options):
    out, a, b, start, _ = launch(*args, **options)
    return np.array_equal(out, accumulators(start + sign * (a @ b.T)))


@pytest.mark.parametrize("kind", NUMPY)
@pytest.mark.parametrize("n", [8, 24, 64, 200, 256])
def test_shapes(kind, n):
    kernel = Kernel(compile_hopper(n, kind=kind), "product")
    assert exact(kernel, n, kind)
    assert exact(kernel, n, kind, accumulate=False)


@pytest.mark.parametrize("kind", NUMPY)
@pytest.mark.parametrize("a_swizzle", [16, 32, 64, 128])
@pytest.mark.parametrize("b_swizzle", [16, 32, 64, 128])
def test_swizzles_k_major(kind, a_swizzle, b_swizzle):
    """A row of the pattern holds more values of k than one wgmma takes: it reads the first of them."""
    kernel = Kernel(compile_hopper(32, kind=kind), "product")
    assert exact(kernel, 32, kind, (a_swizzle, b_swizzle))


@pytest.mark.parametrize("a_swizzle", [16, 32, 64, 128])
@pytest.mark.parametrize("b_swizzle", [16, 32, 64, 128])
def test_swizzles_mn_major(a_swizzle, b_swizzle):
    kernel = Kernel(compile_hopper(128, transposes=(1, 1)), "product")
    assert exact(kernel, 128, "f16", (a_swizzle, b_swizzle), (True, True))


@pytest.mark.parametrize("majors", [(0, 1), (1, 0)])
def test_one_operand_transposed(majors):
    kernel = Kernel(compile_hopper(64, kind="bf16", transposes=majors), "product")
    assert exact(kernel, 64, "bf16", (128, 64), tuple(map(bool, majors)))


@pytest.mark.parametrize(("kind", "major"), [(k, m) for k in NUMPY for m in (False, True) if k != "tf32" or not m])
def test_a_from_registers(kind, major):
    kernel = Kernel(compile_hopper(40, kind=kind, registers=True, transposes=(0, int(major))), "product")
    assert exact(kernel, 40, kind, majors=(False, major))


@pytest.mark.parametrize(("scales", "sign"), [((-1, 1), -1), ((1, -1), -1), ((-1, -1), 1)])
def test_negation(scales, sign):
    assert exact(Kernel(compile_hopper(16, scales=scales), "product"), 16, "f16", sign=sign)


def test_wavefronts_of_operands():
    """128 bytes each: a is 2 KB, b 1 KB, whatever the swizzle; a tf32 operand cut at 13 bits is no exact product."""
    kernel = Kernel(compile_hopper(32), "product")
    for swizzle in (16, 32, 64, 128):
        report = launch(kernel, 32, "f16", (swizzle, swizzle))[-1]
        mma = report.classes["mma"]
        assert report.mma_flops == {"m64n32k16": 2 * 64 * 32 * 16}
        assert (mma["ideal"], mma["bytes"]) == (24, 3072)
        # Rows of the pattern lie `swizzle` bytes apart, so that 8 of them cover the banks once.
        assert mma["units"] == mma["ideal"]


def test_every_statement_that_orders_is_needed():
    ptx = compile_hopper(24)
    body = entry(ptx, "product")
    pattern = r"^\s*(wgmma\.(wait_group|fence|commit_group)|fence\.proxy|bar\.sync).*$"
    assert exact(Kernel(body), 24, "f16")
    assert survivors(body, pattern, "product", lambda kernel: exact(kernel, 24, "f16")) == []


def mutant(old, new, count=1):
    ptx = compile_hopper(24)
    assert ptx.count(old) >= 1
    return Kernel(ptx.replace(old, new, count), "product")


FIRST_WARP = "mov.u32 %r1, %tid.x;\nsetp.lt.u32 %p1, %r1, 32;\n"
WAIT = "wgmma.wait_group.sync.aligned 0;"


@pytest.mark.parametrize(
    ("old", "new", "kind", "words"),
    [
        (WAIT, "", "async", "which a wgmma holds"),
        (WAIT, "wgmma.wait_group.sync.aligned 1;", "async", "which a wgmma holds"),
        ("wgmma.commit_group.sync.aligned;", "", "async", "which a wgmma holds"),
        ("wgmma.fence.sync.aligned;", "", "async", "without a wgmma.fence"),
        ("fence.proxy.async.shared::cta;", "", "async", "without a fence.proxy.async"),
        (WAIT, f"st.shared.b32 [memory], %r1;\n{WAIT}", "async", "over an operand of a wgmma"),
        ("wgmma.commit_group.sync.aligned;", "wgmma.commit_group.sync.aligned;\nexit;", None, ""),
        ("wgmma.mma_async", FIRST_WARP + "@%p1 exit;\nwgmma.mma_async", "divergence", "warpgroup"),
    ],
)  # fmt: skip
def test_planted(old, new, kind, words):
    kernel = mutant(old, new)
    if kind is None:
        launch(kernel, 24, "f16")
        return
    with pytest.raises(Fault) as caught:
        launch(kernel, 24, "f16")
    assert caught.value.kind == kind
    assert words in caught.value.text


def test_descriptors_of_the_warps_must_agree():
    old = "wgmma.fence.sync.aligned;"
    with pytest.raises(Fault, match=r"divergence: .*descriptors"):
        launch(Kernel(shift_descriptor(compile_hopper(24), old), "product"), 24, "f16", (16, 128))


def shift_descriptor(ptx, before):
    """Adds the warp's number to a field of b's descriptor, one that a swizzled matrix does not use."""
    b = ptx.split("wgmma.mma_async", 1)[1].split("}, ", 1)[1].split(", ")[1]
    shift = "mov.u32 %r1, %tid.x;\nshr.u32 %r1, %r1, 5;\ncvt.u64.u32 %rd1, %r1;\nshl.b64 %rd1, %rd1, 16;\n"
    shift += f"add.s64 {b}, {b}, %rd1;\n{before}"
    return ptx.replace(before, shift, 1)


def test_part_of_a_warpgroup_is_refused():
    kernel, image = Kernel(compile_hopper(24), "product"), np.zeros(4096, np.uint8)
    out, fragments = np.zeros((12, 128), "f"), np.zeros(512, np.uint32)
    with pytest.raises(Fault, match="no whole warpgroup"):
        kernel.launch(1, 96, image, image, 256, 256, 0, 0, 0, out, fragments, shared=8192)


def test_tf32_drops_low_bits():
    kernel = Kernel(compile_hopper(8, kind="tf32"), "product")
    x = np.full((64, 8), 1 + 2.0**-20, "f")
    image, desc = shared_image(x, 16, False)
    out = np.zeros((4, 128), "f")
    n = len(image) // 16
    kernel.launch(1, 128, image, image, n, n, desc, desc, 0, out, np.zeros(512, np.uint32), shared=2 * len(image))
    assert (out == 8).all()

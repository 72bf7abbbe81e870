"""What nvcc made of the CUDA kernels for sm_80, sm_90 and sm_100, read from the built extension."""

import itertools

import pytest
import torch
from helpers import cuda_gate as gate

from resnet_fast.gpu.candidates import conv1x1 as conv1x1_configs
from resnet_fast.gpu.candidates import hopper as hopper_configs
from resnet_fast.gpu.candidates import weight_gradient as gradient_configs
from resnet_fast.gpu.candidates.cuda import tiles

ARCHS = (80, 90, 100)
CONVOLUTION = "conv_bn_relu_fwd_kernel"


def convolutions(arch=None):
    return [k for k in gate.kernels() if k.stem == CONVOLUTION and arch in (None, k.arch)]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_instance_is_there(arch):
    """The tests of values execute these instances; none is shipped that they do not know."""
    expected = {(t, i) for i, tile in enumerate(tiles()) for t in ("float16", "bfloat16", "float32") if not tile.simt}
    expected |= {("float32", i) for i, tile in enumerate(tiles()) if tile.simt}
    assert {(k.dtype, k.values[0]) for k in convolutions(arch)} == expected


def test_nothing_spills():
    for k in gate.kernels():
        what = f"sm_{k.arch} {k.stem}<{k.dtype}, {k.values}>: {k.registers} registers"
        assert k.spills == k.stack == k.local == 0, what


@pytest.mark.parametrize("arch", ARCHS)
def test_convolutions(arch):
    for k in convolutions(arch):
        tile = tiles()[k.values[0]]
        what = f"sm_{k.arch} {k.dtype} {tile}: {k.registers} registers, {dict(k.opcodes.most_common(8))}"
        # Two blocks fit a multiprocessor: 64K registers, in units of 256 a warp.
        assert 2 * tile.threads // 32 * -(-k.registers * 32 // 256) * 256 <= 65536, what
        # All of it is dynamic, and so in the plan; sm_90 and later set 1 KB apart for the system.
        assert k.shared == (0 if arch == 80 else 1024), what
        assert (k.count("HMMA") > 0) is not tile.simt, what
        assert k.count("LDGSTS.128") > 0 or tile.load == "scalar", what
        if k.dtype != "float32":
            assert k.count("LDG.128") > 0, what  # the residual
            assert k.count("STG.128") > 0, what
        if tile.simt:
            assert k.main_loop["FFMA"] >= 512, what
        else:
            # Fragments come by ldmatrix alone.
            products = sum(n for name, n in k.main_loop.items() if name.startswith("HMMA"))
            loads = sum(n for name, n in k.main_loop.items() if name.startswith("LDSM"))
            assert 0 < loads <= products, what


def test_hopper_convolutions():
    """wgmma and nothing else multiplies; all instances are there, and registers allow the blocks of the plan."""
    found = [k for k in gate.kernels() if k.stem == "conv_halo_fwd_kernel" and k.arch == 90]
    kinds = itertools.product(range(len(hopper_configs.tiles())), (64, 32, 16), (1, 2))
    expected = set(itertools.product(("float16", "bfloat16"), kinds))
    assert {(k.dtype, k.values) for k in found} == expected
    for k in found:
        tile, channels = hopper_configs.tiles()[k.values[0]], k.values[1]
        what = f"{k.dtype} {tile} {channels}: {k.registers} registers, {dict(k.opcodes.most_common(8))}"
        assert k.count("HGMMA") == channels // 16, what  # a step's: the loop is not unrolled, nothing is repeated
        assert k.count("HMMA") == 0, what
        # One block fits a multiprocessor, two where a block is one warpgroup.
        blocks = 2 if tile.warpgroups == 1 else 1
        assert blocks * 4 * tile.warpgroups * -(-k.registers * 32 // 256) * 256 <= 65536, what
        assert k.shared == 1024, what
        assert k.count("LDGSTS.128") > 0, what
        assert k.count("STG.128") > 0, what
        # The loop waits for products and copies, never for all of them.
        loop = k.main_loop
        assert sum(n for name, n in loop.items() if name.startswith("HGMMA")) == channels // 16, what


def test_hopper_1x1_convolutions():
    """As above; as many blocks of a tile as it says share a multiprocessor."""
    found = [k for k in gate.kernels() if k.stem == "conv1x1_fwd_kernel" and k.arch == 90]
    expected = set(itertools.product(("float16", "bfloat16"), range(len(conv1x1_configs.tiles()))))
    assert {(k.dtype, k.values[0]) for k in found} == expected
    for k in found:
        tile = conv1x1_configs.tiles()[k.values[0]]
        what = f"{k.dtype} {tile}: {k.registers} registers, {dict(k.opcodes.most_common(8))}"
        assert tile.blocks * 4 * tile.warpgroups * -(-k.registers * 32 // 256) * 256 <= 65536, what
        assert k.count("HGMMA") == sum(n for name, n in k.main_loop.items() if name.startswith("HGMMA")) == 4, what
        assert k.count("HMMA") == 0, what
        assert k.shared == 1024, what
        assert k.count("LDGSTS.128") > 0, what
        assert k.count("STG.128") > 0, what


def test_hopper_weight_gradients():
    """As above; fragments come by ldmatrix, vectors of the prologue whole, and two groups are a turn of the loop."""
    found = [k for k in gate.kernels() if k.stem == "weight_gradient_kernel" and k.arch == 90]
    expected = set(itertools.product(("float16", "bfloat16"), range(len(gradient_configs.tiles()))))
    assert {(k.dtype, *k.values) for k in found} == expected
    for k in found:
        tile = gradient_configs.tiles()[k.values[0]]
        what = f"{k.dtype} {tile}: {k.registers} registers, {dict(k.opcodes.most_common(8))}"
        products = 2 * tile.steps * tile.products * tile.parts // 3  # of a warpgroup
        assert k.count("HGMMA") == products, what
        assert sum(n for name, n in k.main_loop.items() if name.startswith("HGMMA")) == products, what
        assert k.count("HMMA") == 0, what
        assert 12 * -(-k.registers * 32 // 256) * 256 <= 65536, what
        assert k.shared == 1024, what
        assert k.count("LDSM") >= 2 * tile.steps, what
        assert k.count("LDGSTS.128") > 0, what
        assert k.count("LDS.128") >= 10, what
        assert k.count("STS.128") >= 2, what
        others = k.main_loop.total() - products
        print(f"{what}; {others / products:.1f} beside each product in the code of the loop")


@pytest.mark.parametrize("stem", ["conv_halo_fwd_kernel", "conv1x1_fwd_kernel", "weight_gradient_kernel"])
@pytest.mark.parametrize("arch", [80, 100])
def test_other_architectures_hold_no_wgmma(arch, stem):
    found = [k for k in gate.kernels() if k.stem == stem and k.arch == arch]
    assert found
    assert all(k.opcodes.total() < 32 for k in found)


@pytest.mark.parametrize("arch", ARCHS)
def test_pooled_stems(arch):
    """Three blocks fit a multiprocessor, two of SIMT kernels; filters stay in registers over the loops."""
    found = [k for k in gate.kernels() if k.stem == "conv_bn_relu_pool_fwd_kernel" and k.arch == arch]
    kinds = torch.ops.resnet_fast.conv_bn_relu_pool_kernels()
    kinds = [kinds[i : i + 3] for i in range(0, len(kinds), 3)]
    expected = {
        (t, i)
        for i, (_, _, simt) in enumerate(kinds)
        for t in ("float16", "bfloat16", "float32")
        if not simt or t == "float32"
    }
    assert {(k.dtype, k.values[0]) for k in found} == expected
    for k in found:
        size, overlap, simt = kinds[k.values[0]]
        what = f"sm_{k.arch} {k.dtype} {size, overlap, simt}: {k.registers} registers, {k.opcodes.most_common(6)}"
        assert (2 if simt else 3) * 4 * -(-k.registers * 32 // 256) * 256 <= 65536, what
        assert k.shared == (0 if arch == 80 else 1024), what
        assert k.count("LDGSTS.128") > 0, what
        assert k.count("LDG.128") > 0, what  # planes
        if k.dtype != "float32":
            assert k.count("STG.128") > 0, what
        if not simt:
            (loop,) = (b for b in k.inner_loops if max(k.inner_loops, key=lambda b: b.total()) == b)
            products = sum(n for name, n in loop.items() if name.startswith("HMMA"))
            # A tile of 8 pixels: 10 steps of 2 x 4 products of 16 bits, or 20 of 2 x 2 of TF32; and half of it again,
            # without the row above, where windows overlap.
            assert products == (4 if size == 7 else 0.8) * 20 * (1.5 if overlap else 1), what
            print(f"{what}: {(loop.total() - products) / products:.2f} beside each mma in the code of the loop")


# Instructions of the main loop beside each mma on sm_80, of which seven cost nothing: an mma keeps a scheduler's tensor
# core busy for eight clocks. For whole blocks; of 9 runs of 16 pixels 8 may hold pixels (28x28, batch 8).
@pytest.mark.parametrize(("tile", "runs", "most"), [(0, (4, 4), 2.2), (1, (9, 9), 1.8), (1, (8, 9), 1.8)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_main_loop(tile, runs, most, dtype):
    (kernel,) = (k for k in convolutions(80) if (k.dtype, k.values) == (dtype, (tile,)))
    loop = kernel.main_loop
    products = sum(n for name, n in loop.items() if name.startswith("HMMA"))
    others = (loop.total() - products) / (products * runs[0] / runs[1])
    print(f"tile {tile}, {runs[0]} of {runs[1]} runs: {others:.2f} instructions beside each mma")
    assert others <= most

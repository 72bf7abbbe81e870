"""What the stage kernels cost: traffic, wavefronts and products as the simulator counts them, registers and
instructions as ptxas made them for sm_80, sm_90 and sm_100."""

import pytest
import torch
from helpers import cuda_gate
from helpers.stage_support import EagerStage, FastStage, add_kernels, input_of
from helpers.support import computing, twins
from ptxsim.sass import ARCHS, SHARED_BLOCK

from resnet_fast.gpu import residual_network
from resnet_fast.gpu.residual_network import kernels

KERNELS = [pytest.param(k, id=k.name(k.dtypes()[0])) for k in kernels()]
BLOCKS = 3


def rows_of_a_warp(kernel):
    """Tiles of 16 pixels one below the other, as StageShape::kRows has them."""
    strips, rows = (kernel.size // 16, kernel.size) if kernel.size >= 16 else (1, kernel.size // 2)
    return rows * kernel.images * strips * (kernel.channels // 16) // (kernel.threads // 32)


def launch(device, monkeypatch, kernel):
    """One block of threads, all its images: the report, the input, the network's parameters in bytes, the output."""
    add_kernels(device)
    dtype = kernel.dtypes()[0]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(residual_network, "_choose", lambda *_: kernels().index(kernel))
    fast, _ = twins(FastStage, EagerStage, kernel.entry, kernel.channels, BLOCKS)
    fast.to(dtype)
    x = input_of(kernel, kernel.images, dtype)
    with torch.no_grad():
        y = fast(x)
    ((_, report),) = computing(device)
    convolutions = [m.weight for m in fast.modules() if isinstance(m, torch.nn.Conv2d)]
    # Of a batch norm a scale and a shift in float32.
    filters = sum(w.nbytes + 8 * w.shape[0] for w in convolutions)
    return report, x, filters, y


@pytest.mark.parametrize("kernel", KERNELS)
def test_counters(simulated_device, monkeypatch, kernel):
    report, x, filters, y = launch(simulated_device, monkeypatch, kernel)
    read, written = report.compulsory_bytes
    touched, least = report.sectors
    # Memory: images in, filters once, the last map out. The stem's filters are stored with zeros (48 rows for 27).
    assert written == y.nbytes
    assert x.nbytes + filters <= read <= x.nbytes + filters + kernel.itemsize * 21 * 16 * (kernel.entry == "stem")
    # Every request in whole sectors, and hardly a byte twice: what is copied behind a slice is 1/36 of it.
    assert touched == least
    assert 32 * touched <= 1.03 * (read + written)

    # Shared memory: no access that a bank has to serve twice, in all of the kernel.
    assert report.conflicts() == []
    # Of an mma: 32 bytes of input channels.
    products = sum(report.mma_flops.values()) / (2 * 16 * 8 * 32 // kernel.itemsize)
    operands = sum(
        r.units
        for r in report.rows
        if r.kind == "matrix" or (r.kind == "load_shared" and ".v4" in r.text and "_conv.cuh" in r.source)
    )
    rows = rows_of_a_warp(kernel)
    # A step of a warp: (rows + 2) x 3 matrices of input and 9 of filters, 4 wavefronts each, for 18 products a row.
    print(f"{kernel.name(x.dtype)}: {operands / products:.2f} wavefronts a mma, {rows} rows a warp")
    assert operands / products <= 1.06 * 4 * (3 * (rows + 2) + 9) / (18 * rows)

    # Products: those of the convolutions as defined, none for padding; the stem's 27 are 48.
    c, pixels = kernel.channels, kernel.images * kernel.size**2
    useful = 9 * c * c * (2 * BLOCKS)
    if kernel.entry == "stem":
        useful += 48 * c
    if kernel.entry == "strided":
        useful += c // 2 * c - 9 * c // 2 * c
    assert sum(report.mma_flops.values()) == 2 * pixels * useful


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiled(kernel, arch):
    for dtype in kernel.dtypes():
        (sass,) = (k for k in cuda_gate.kernels() if (k.arch, k.stem) == (arch, kernel.name(dtype)))
        assert sass.spills == sass.stack == sass.local == 0
        products = "HMMA.16816.F32" if kernel.itemsize == 2 else "HMMA.1688.F32.TF32"
        assert sass.count(products) == sass.count("HMMA") > 0
        assert sass.count("LDSM") > 0
        # Maps and filters 16 bytes a copy; out of the map, 16 bytes a store.
        assert sass.count("LDGSTS.128") == sass.count("LDGSTS") > 0
        assert sass.count("STG.128") > 0
        # The linear layer's scores and parameters are the only narrow accesses.
        narrow = sass.count("LDG") + sass.count("STG") - sass.count("STG.128")
        assert narrow == 0 or kernel.size == 8
        assert kernel.shared <= SHARED_BLOCK[80]

        # As many blocks a multiprocessor as the shared memory admits.
        expected = max(1, 164 * 1024 // (kernel.shared + 1024))
        assert sass.blocks(kernel.threads, kernel.shared) >= expected

        # Besides products: the copies of the next slice; for few channels, all that comes between two layers; for TF32,
        # its rounding. Seven are what A100s issue in the time of one product.
        products = [sum(n for name, n in loop.items() if name.startswith("HMMA")) for loop in sass.inner_loops]
        others = max(loop.total() / n - 1 for loop, n in zip(sass.inner_loops, products, strict=True))
        print(f"{kernel.name(dtype)} sm_{arch}: {sass.registers} registers, {others:.2f} other instructions a mma")
        few = rows_of_a_warp(kernel) == 2
        most = {2: 2.1 if few else 1.25, 4: 5.5 if few else 4.3}[kernel.itemsize]
        assert others <= (2.5 if kernel.channels == 16 else most)

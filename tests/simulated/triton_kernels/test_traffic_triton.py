"""What the Triton convolution costs, counted by the simulator, and the time that follows for an A100.

The bound is that of the busiest of the parts that a convolution keeps busy, at these speeds: 108 multiprocessors at
1.41 GHz with four schedulers, 8 clocks for each mma.m16n8k16 of a scheduler, one instruction a clock and scheduler, one
wavefront of shared memory a clock, 4 TB/s from the second-level cache (whose reads an ideal first-level cache merges
within a block), 1.5 TB/s from memory. It is computed, not measured, and leaves out latency and launches.
"""

import math

import numpy as np
import pytest
import torch
from helpers.conv_support import block_case, layer_of

from resnet_fast import ops
from resnet_fast.gpu.candidates.triton import default
from resnet_fast.gpu.layer import A100

CLOCK = 1.41e9
L2, DRAM = 4e12, 1.5e12
MMA = 2 * 16 * 8 * 16

# Bounds of PyTorch Inductor's Triton template (torch 2.13, with bias, residual and ReLU in its epilogue) on the same
# layers in fp16 with the best tile of its list, by the same rule, computed on 2026-11-25; batch, size, channels; in
# microseconds. Its asynchronous copies bypass the first-level cache, so all sectors they ask for come from the second.
INDUCTOR = {
    (8, 56, 64): 10.5,
    (8, 28, 128): 11.3,
    (8, 14, 256): 14.3,
    (8, 7, 512): 19.0,
    (64, 32, 16): 4.6,  # by 1024x16x16 in one stage, without asynchronous copies; 5.9 by 256x16x16
    (64, 16, 32): 3.0,
    (64, 8, 64): 2.7,
}


def run(device, case):
    before = len(device.launches)
    ops.conv_bn_add_relu(case.x, case.residual, case.weight, torch.zeros(len(case.weight)), padding=1)
    return device.launches[before:]


def pixels_touched(layer, block_m):
    """Input pixels that each block of block_m output pixels reads, each once, summed over the blocks."""
    total = 0
    for first in range(0, layer.pixels, block_m):
        m = np.arange(first, min(layer.pixels, first + block_m))
        image, row, col = m // (layer.height * layer.width), m // layer.width % layer.height, m % layer.width
        seen = []
        for r in (-1, 0, 1):
            for s in (-1, 0, 1):
                inside = (row + r >= 0) & (row + r < layer.height) & (col + s >= 0) & (col + s < layer.width)
                seen.append(((image * layer.height + row + r) * layer.width + col + s)[inside])
        total += len(np.unique(np.concatenate(seen)))
    return total


def a100_bound(layer, config, launches):
    """Microseconds, by the rule above; a split sum's second kernel comes after the first."""
    name, report = launches[0]
    assert name == "_conv_bn_relu_fwd_kernel"
    busiest = math.ceil(config.blocks(layer) / A100.multiprocessors) / config.blocks(layer)
    copied = sum(r.bytes for r in report.rows if r.kind == "async_copy")
    size = layer.dtype.itemsize
    columns = -(-layer.out_channels // config.block_n)
    filters = config.blocks(layer) // config.split_k * min(config.block_n, layer.out_channels) * layer.gemm_k * size
    outputs = layer.pixels * layer.out_channels * size
    cached = pixels_touched(layer, config.block_m) * columns * layer.channels * size + filters
    # A block of a split sum writes float32; only undivided ones read the residual and write the output here.
    cached += 2 * outputs if config.split_k == 1 else config.split_k * layer.pixels * layer.out_channels * 4
    read = layer.pixels * layer.channels * size + layer.out_channels * layer.gemm_k * size
    memory = read + (2 * outputs if config.split_k == 1 else 0)
    seconds = max(
        sum(report.mma_flops.values()) / MMA * 2 * busiest / CLOCK,
        report.total("warps") * busiest / 4 / CLOCK,
        (report.wavefronts[0] + copied / 128) * busiest / CLOCK,
        cached / L2,
        memory / DRAM,
    )
    if config.split_k > 1:
        seconds += max((config.split_k * layer.pixels * layer.out_channels * 4 + 2 * outputs) / L2, 2 * outputs / DRAM)
    return seconds * 1e6


@pytest.mark.parametrize(("shape", "inductor"), INDUCTOR.items(), ids=str)
def test_bound(simulated_device, shape, inductor):
    """At most 0.85 of the bound of Inductor's template, with the tile that our own model picks first; or where that
    cannot be, at 16 channels, what memory alone takes: image, residual, result and filters, each once."""
    case = block_case(*shape)
    config = default(layer_of(case), A100)
    bound = a100_bound(layer_of(case), config, run(simulated_device, case))
    print(f"{shape}: {config}: {bound:.1f} us computed for an A100, {bound / inductor:.2f} of Inductor's")
    floor = (3 * case.x.nbytes + case.weight.nbytes) / DRAM * 1e6
    assert floor <= bound <= max(0.85 * inductor, 1.001 * floor), (config, bound)
    assert bound <= 0.92 * inductor, (config, bound)


STAGES = [(8, 56, 64), (4, 28, 128), (2, 14, 256), (1, 7, 512), (2, 32, 16), (2, 16, 32), (4, 8, 64)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["16 bits", "tf32"])
@pytest.mark.parametrize("shape", STAGES, ids=str)
def test_sectors_and_banks(simulated_device, shape, dtype, monkeypatch):
    """Whole sectors in every request to global memory, no bank conflict, no divergent branch."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    for name, report in run(simulated_device, block_case(*shape, dtype)):
        touched, least = report.sectors
        assert touched == least, name
        assert report.conflicts() == [], name
        assert report.divergent_branches == 0, name

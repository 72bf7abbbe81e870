"""What convolutions move, counted by the simulator, that holds for both kinds of kernels."""

import pytest
import torch
from helpers.conv_support import SPLIT_SUMS, plain, whole_case
from helpers.support import channels_last, computing

import resnet_fast
from resnet_fast import ops
from resnet_fast.gpu import tune


@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (1, 2), (3, 2)])
def test_sectors_and_banks_of_other_filters(device, backend, kernel_size, stride):
    """Of bottlenecks, and where a stage halves its maps: whole sectors, no bank conflict; in Triton, which predicates
    what CUDA C++ branches over, no divergent branch."""
    x, weight = channels_last(torch.randn(2, 64, 16, 16).half()), torch.randn(128, 64, kernel_size, kernel_size).half()
    ops.conv_bn_relu(x, weight, torch.zeros(128), stride=stride, padding=kernel_size // 2)
    for name, report in device.launches:
        assert report.sectors[0] == report.sectors[1], name
        assert report.conflicts() == [], name
        assert backend == "cuda" or report.divergent_branches == 0, name


@torch.no_grad()
def test_memory_traffic_of_a_basic_block(device, backend):
    """Two kernels: image, both filters, the map between, image again as residual, result; each byte of it once."""
    model = resnet_fast.blocks.BasicBlock(64, 64).eval().half()
    x = channels_last(torch.randn(2, 64, 56, 56).half())
    model(x)
    device.launches.clear()  # the filters are packed now
    model(x)
    launches = computing(device)
    assert len(launches) == 2
    moved = sum(sum(report.compulsory_bytes) for _, report in launches)
    compulsory = 5 * x.nbytes + 2 * model.conv1.weight.nbytes
    assert compulsory < moved <= 1.05 * compulsory
    if backend == "triton":  # whose arguments have names
        assert [r.buffers["y"]["written"] for _, r in launches] == [x.nbytes] * 2
        assert [r.buffers.get("residual", {}).get("read") for _, r in launches] == [None, x.nbytes]


def test_split_sums_are_written_once(device, backend):
    """In Triton each part, and a second launch adds them; in CUDA C++ all but the last of a sum's blocks."""
    with tune.use(SPLIT_SUMS[backend]):
        y = plain(whole_case(2, (8, 8), 128, 32, 3, 1, 1, torch.float16))
    part = y.numel() * 4
    if backend == "triton":
        (_, first), (_, second) = device.launches
        assert first.buffers["partial"]["written"] == second.buffers["partial"]["read"] == 4 * part
        assert second.buffers["y"]["written"] == y.nbytes
    else:
        ((_, report),) = device.launches
        partial = next(b for name, b in report.buffers.items() if name == "arg6")
        assert partial["written"] == partial["read"] == 3 * part

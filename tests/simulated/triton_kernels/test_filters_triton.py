"""Filters between the layouts and dtypes of parameters and of kernels, on the simulated device."""

import pytest
import torch
from helpers.support import channels_last

from resnet_fast._triton import filters

SHAPES = [(5, 3, 3, 3), (64, 17, 1, 1), (2, 16, 7, 5), (1, 1, 1, 1), (33, 40, 3, 1)]


def weight(shape, layout, dtype):
    t = torch.randn(shape).to(dtype)
    if layout == "sliced":
        whole = torch.randn(shape[0], shape[1] + 2, *shape[2:]).to(dtype)
        return whole[:, 1:-1].copy_(t)
    return channels_last(t) if layout == "channels_last" else t


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("wide", [False, True])
def test_there_and_back(simulated_device, monkeypatch, shape, layout, wide):
    if wide:
        monkeypatch.setattr(filters, "is_wide", lambda *_: True)
    for dtype, other in (
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
    ):
        w = weight(shape, layout, dtype)
        packed = filters.packed(w, other)
        assert packed.dtype == other
        assert packed.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(packed, w.to(other))
        back = filters.like(packed, w)
        assert (back.dtype, back.shape) == (dtype, w.shape)
        assert back.stride() == torch.empty_like(w).stride() or 1 in shape
        assert torch.equal(back, w.to(other).to(dtype))


def test_no_copy_where_none_is_needed(simulated_device):
    w = channels_last(torch.randn(8, 4, 3, 3))
    assert filters.packed(w, torch.float32) is w
    assert filters.like(w, w.clone()) is w
    assert not simulated_device.launches


def test_offsets_that_need_64_bits():
    assert not filters.is_wide(torch.empty(8, 4, 3, 3), torch.empty(512, 512, 3, 3, device="meta"))
    assert filters.is_wide(torch.empty(2**16, 2**12, 3, 3, device="meta"))
    assert filters.is_wide(torch.empty(8, 4, 3, 3), torch.empty(2**31, 1, 1, 1, device="meta"))

"""What is true of add_relu in Triton alone: its launcher, and what ptxas makes of its kernel."""

import re

import pytest
import torch
import torch.nn.functional as F
from helpers import triton_gate as gate

from resnet_fast._triton.add_relu import DTYPES, add_relu, geometry


def test_layouts_and_empty(simulated_device):
    a, b = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7)
    for x in (a, a.contiguous(memory_format=torch.channels_last), a.transpose(1, 3).contiguous().transpose(1, 3)):
        for y in (b, torch.randn(2, 6, 5, 7)[:, ::2]):
            assert torch.equal(add_relu(x, y), F.relu(x + y))
    launched = len(simulated_device.launches)
    assert add_relu(a[:0], b[:0]).shape == (0, 3, 5, 7)
    assert len(simulated_device.launches) == launched


def test_bad_arguments(simulated_device):
    a = torch.ones(4)
    with pytest.raises(ValueError, match=r"b has shape \(3,\), want \(4,\)"):
        add_relu(a, a[:3])
    with pytest.raises(TypeError, match=r"b is torch.float64, want torch.float32"):
        add_relu(a, a.double())
    with pytest.raises(TypeError, match=r"a is torch.int64, want torch.float16 or"):
        add_relu(a.long(), a.long())


def test_geometry():
    assert geometry(0, 2) == ((0,), 2048)
    assert geometry(2049, 2) == ((2,), 2048)
    assert geometry(2**32 + 1, 4) == ((2**22 + 1,), 1024)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", gate.ARCHS)
def test_code(arch, dtype):
    """Odd sizes too: whole blocks move vectors, and the block's offset is 64-bit."""
    x = torch.ones(2049, dtype=dtype)
    ((kernel, args, meta),) = gate.launches(add_relu, x, x)
    sass = gate.inspect_launch(kernel, args, meta, arch)
    assert sass.spills == sass.stack == 0
    assert sass.count("LDG.128") == 4
    assert sass.count("STG.128") == 2
    assert sass.blocks_per_sm >= 8
    assert re.search(r"setp\.\w+\.[su]64", sass.ptx)  # the block's first element against n

"""Which bytes of a tensor ``StalenessGuard`` compares at every check, where PyTorch does not see them change."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from resnet_fast.chain.guard import StalenessGuard


def watched_memory(count):
    """Bytes that PyTorch does not see change, as the only tensor of a module; and its guard."""
    memory, owner = np.zeros(count, np.uint8), nn.Module()
    owner.register_buffer("floats", torch.from_numpy(memory).view(torch.float8_e5m2))
    return memory, StalenessGuard([owner])


@pytest.mark.parametrize("count", [0, 1, 7, 63, 64, 65, 127, 448, 511, 512])
def test_every_byte_of_a_small_tensor_counts(count):
    memory, seen = watched_memory(count)
    assert seen.is_valid()
    for i in range(count):
        memory[i] ^= 1 << i % 8
        assert not seen.is_valid()
        memory[i] = 0
        assert seen.is_valid()


@pytest.mark.parametrize("count", [513, 1000, 4096, 9216, 2_359_296])
def test_eight_lines_of_a_large_tensor_count(count):
    """The first 64 bytes, the last 64, and six pieces between that lie evenly."""
    memory, guard = watched_memory(count)
    step, seen = max(1, count // 50_000), []
    for at in range(0, count, step):
        memory[at] = 1
        if not guard.is_valid():
            seen.append(at)
        memory[at] = 0
    assert seen[0] == 0
    assert seen[-1] > count - 1 - step
    pieces = len(seen) if step > 64 else len(seen) * step / 64
    assert 7 <= pieces <= 9
    assert max(b - a for a, b in itertools.pairwise(seen)) <= count / 7 + 64


def test_a_change_of_all_bytes_alike():
    for count in (5, 64, 100, 1000):
        memory, seen = watched_memory(count)
        for change in (1, 128, 255):
            memory[:] = change
            assert not seen.is_valid()
        memory[:] = 0
        assert seen.is_valid()

"""How ``StalenessGuard`` reads tensors, and which bytes it compares where PyTorch does not see them change."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from resnet_fast.backends.native import extension
from resnet_fast.chain import tensor_state
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


def test_tensors_that_are_read_without_getters():
    """In the releases that the tests run in: else every call is slower, which nothing else would show."""
    assert tensor_state.of(torch.zeros(3)) is not None
    assert tensor_state.of(nn.Parameter(torch.zeros(2, 3).t())) is not None
    assert tensor_state.of(nn.Buffer(torch.zeros(3))) is not None
    with torch.inference_mode():
        assert tensor_state.of(torch.zeros(3)) is None


@pytest.fixture
def asked_anew():
    tensor_state._is_reliable.cache_clear()
    yield
    tensor_state._is_reliable.cache_clear()


def test_a_mode_does_not_change_how_tensors_are_read(asked_anew):
    """Whether C++ can read them is found out once, wherever it is asked first."""
    t = torch.zeros(3)
    with FakeTensorMode():
        assert tensor_state.of(t) is not None
    tensor_state._is_reliable.cache_clear()

    def ask(x):
        assert tensor_state.of(t) is not None
        return x.sum()

    torch.func.grad(ask)(torch.zeros(3))
    assert tensor_state._is_reliable()


WITHOUT_ADDRESSES = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse rows": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
}


@pytest.mark.filterwarnings("ignore:Sparse|The PyTorch API of nested")
@pytest.mark.parametrize("make", WITHOUT_ADDRESSES.values(), ids=WITHOUT_ADDRESSES)
def test_tensors_without_addresses(make):
    owner = nn.Module()
    owner.register_buffer("other", make())
    seen = [StalenessGuard([owner], contents=contents) for contents in (True, False)]
    assert all(w.is_valid() for w in seen)
    owner.other.mul_(2)
    assert [w.is_valid() for w in seen] == [False, True]
    seen = [StalenessGuard([owner], contents=contents) for contents in (True, False)]
    owner.other = make()
    assert [w.is_valid() for w in seen] == [False, False]


@pytest.mark.parametrize("wrong", range(4))
def test_tensors_that_are_not_found(wrong):
    t = torch.zeros(3)
    right = [t._cdata, torch._C.TensorBase.__basicsize__, t.data_ptr(), t._version]
    assert extension.tensor_state(t, *right) is not None
    for value in (0, right[wrong] + 1) if wrong != 1 else (0, 8, 16):
        described = [*right[:wrong], value, *right[wrong + 1 :]]
        assert described == right or extension.tensor_state(t, *described) is None

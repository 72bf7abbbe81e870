"""Memory of maps that go is kept for the next ones: never that of a living tensor, and never much of it."""

import gc
import threading

import pytest
import torch
from helpers.support import channels_last

import resnet_fast
from resnet_fast import backends

MIB = 1 << 20


@pytest.fixture(autouse=True)
def start_empty():
    gc.collect()  # what other tests left goes before, not meanwhile
    backends.cpu.keep_memory = False
    backends.cpu.keep_memory = True
    yield
    backends.cpu.keep_memory = True


def new_map(mib, value=0.0):
    """A map of so many MiB, by an operator: relu(y)."""
    y = channels_last(torch.full((1, 16, 128 * mib, 128), value))
    return torch.ops.resnet_fast.bn_apply(y, torch.stack((torch.ones(16), torch.zeros(16))), None, None, True)


def test_memory_is_taken_again():
    first = new_map(2)
    address = first.data_ptr()
    assert backends.cpu.kept_bytes() == 0
    del first
    assert backends.cpu.kept_bytes() == 2 * MIB
    assert new_map(2).data_ptr() == address
    two = [new_map(2), new_map(2)]
    assert two[0].data_ptr() == address
    assert two[1].data_ptr() != address


def test_living_tensors_are_left_alone():
    kept, views = [], []
    for i in range(20):
        a, b = new_map(1 + i % 3, 1.0 + i), new_map(1, 100.0 + i)
        kept.append((a, 1.0 + i))
        views.append((b[:, 3:5, ::2], 100.0 + i))
        del b
    assert all(bool((t == value).all()) for t, value in (*kept, *views))


def test_what_is_kept_is_bounded():
    """With every size another: no more than half of what was in use at once is kept on top of what is."""
    _, used = torch.ops.resnet_fast.kept_memory()  # by what other tests still hold
    for mib in range(1, 24):
        held = [new_map(mib), new_map(mib)]
        del held
        assert backends.cpu.kept_bytes() <= 1.5 * (used + 2 * mib * MIB) - used
    for mib in torch.randint(1, 24, (100,), generator=torch.Generator().manual_seed(0)).tolist():
        new_map(mib)
        assert backends.cpu.kept_bytes() <= 1.5 * (used + 46 * MIB) - used


def test_what_nobody_takes_is_given_back():
    large = new_map(16)
    del large
    assert backends.cpu.kept_bytes() == 16 * MIB
    for _ in range(2 * 4096):
        new_map(1)
    assert backends.cpu.kept_bytes() == MIB


def test_switched_off():
    held = new_map(3)
    del held
    held = new_map(3, 5.0)
    backends.cpu.keep_memory = False
    assert bool((held == 5).all())
    del held
    assert backends.cpu.kept_bytes() == 0
    new_map(3)
    assert backends.cpu.kept_bytes() == 0
    assert not backends.cpu.keep_memory


def test_small_maps_are_not_kept():
    torch.ops.resnet_fast.channel_sums(channels_last(torch.ones(1, 16, 8, 8)))
    assert backends.cpu.kept_bytes() == 0


def training_step(model, x):
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad for p in model.parameters())]


def test_a_training_step_takes_no_more_memory_than_the_one_before():
    torch.manual_seed(0)
    model, x = resnet_fast.cifar_resnet20().train(), channels_last(torch.randn(64, 3, 32, 32))
    for _ in range(3):
        training_step(model, x)
    kept = backends.cpu.kept_bytes()
    assert kept > 0
    for _ in range(3):
        training_step(model, x)
        assert backends.cpu.kept_bytes() == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bit_changes(dtype):
    results = []
    for keep in (True, False):
        backends.cpu.keep_memory = keep
        torch.manual_seed(0)
        model, x = resnet_fast.cifar_resnet20().train().to(dtype), torch.randn(32, 3, 32, 32).to(dtype)
        results.append([t for _ in range(3) for t in training_step(model, x)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_threads():
    torch.manual_seed(0)
    model, x = resnet_fast.resnet18(num_classes=10).eval(), channels_last(torch.randn(4, 3, 224, 224))
    with torch.no_grad():
        want = model(x)
    wrong = []

    def work():
        with torch.no_grad():
            wrong.extend(i for i in range(5) if not torch.equal(model(x), want))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def huge_map(padding):
    """From one pixel."""
    pixel, weight = torch.zeros(1, 1, 1, 1), torch.zeros(40, 1, 1, 1)
    return torch.ops.resnet_fast.conv_bn_stats(pixel, None, False, weight, None, [1, 1], [padding] * 2, 0, False)


def test_too_much():
    """2.7 TB; more than paddings may be. What is kept afterwards is as bounded as before."""
    _, used = torch.ops.resnet_fast.kept_memory()
    with pytest.raises(RuntimeError, match="no memory for 27487371"):
        huge_map(65535)
    with pytest.raises(RuntimeError, match="padding"):
        huge_map(2**31)
    assert bool((new_map(1, 2.0) == 2).all())
    for mib in range(1, 24):
        new_map(mib)
        assert backends.cpu.kept_bytes() <= 1.5 * (used + mib * MIB) - used

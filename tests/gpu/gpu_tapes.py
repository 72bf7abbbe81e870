"""Networks replayed from C++ on the GPU: the bits of calls from Python, on any stream, beside graphs, after changes."""

import time

import pytest
import torch
from helpers.support import randomize_

import resnet_fast
from resnet_fast import backends
from resnet_fast.gpu.tape import Tape


@pytest.fixture
def plain():
    """``plain(model, x)``: a call whose launches come from Python."""

    def call(model, x):
        backends.cuda.replay = False
        try:
            return model(x)
        finally:
            backends.cuda.replay = True

    return call


def network(gpu, name, dtype=torch.float16):
    return randomize_(getattr(resnet_fast, name)().eval()).to(gpu, dtype)


def images(gpu, model, batch, dtype=torch.float16):
    size = 32 if type(model).__name__ == "CifarResNet" else 224
    return torch.randn(batch, 3, size, size, device=gpu, dtype=dtype).contiguous(memory_format=torch.channels_last)


def tapes_of(model):
    owners = [m._chain.gpu for m in model.modules() if getattr(m, "_chain", None)]
    owners += [model._network] if getattr(model, "_network", None) else []
    owners += [model._whole._chain.gpu] if getattr(model, "_whole", None) else []
    return [tape for owner in owners for tape in owner.tapes.found.values()]


@pytest.mark.parametrize("name", ["cifar_resnet20", "ResNet32", "resnet18", "resnet50"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@torch.no_grad()
def test_replayed_calls_give_the_same_bits(gpu, plain, name, dtype):
    model = network(gpu, name, dtype)
    inputs = [images(gpu, model, 2, dtype) for _ in range(5)]
    outs = [model(x) for x in inputs]
    assert any(isinstance(t, Tape) for t in tapes_of(model)), tapes_of(model)
    for x, out in zip(inputs, outs, strict=True):
        assert torch.equal(out, plain(model, x))
    assert backends.fallbacks() == {}


@pytest.mark.machine
@torch.no_grad()
def test_streams_and_graphs(gpu, plain):
    model = network(gpu, "resnet18")
    x, other = images(gpu, model, 4), images(gpu, model, 4)
    want, others = plain(model, x).clone(), plain(model, other).clone()
    for _ in range(3):
        model(x)
    side = torch.cuda.Stream()
    for _ in range(4):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            there = model(other)
        here = model(x)
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(here, want)
        assert torch.equal(there, others)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(x)
    for _ in range(3):
        model(other)
        graph.replay()
        assert torch.equal(captured, want)


@pytest.mark.machine
@torch.no_grad()
def test_changes_are_seen(gpu, plain):
    model = network(gpu, "resnet18")
    x = images(gpu, model, 1)
    for _ in range(4):
        before = model(x)
    model.layer2[0].conv1.weight.mul_(1.5)
    assert torch.equal(model(x), plain(model, x))
    assert not torch.equal(model(x), before)
    calls = []
    handle = model.layer3[0].conv2.register_forward_hook(lambda *_: calls.append(1))
    model(x)
    assert calls == [1]
    handle.remove()
    for _ in range(3):
        out = model(x)
    assert torch.equal(out, plain(model, x))


@pytest.mark.machine
@torch.no_grad()
def test_memory_comes_back(gpu):
    model = network(gpu, "resnet50")
    x = images(gpu, model, 8)
    for _ in range(4):
        model(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        model(x)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.machine
@torch.no_grad()
def test_the_host_takes_a_few_microseconds_a_launch(gpu, plain):
    """Of calls that the GPU cannot keep up with, the first few: what the host takes alone."""
    model = network(gpu, "ResNet32")
    x = images(gpu, model, 1)
    for _ in range(4):
        model(x)

    def host_seconds(call):
        best = float("inf")
        for _ in range(20):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call(x)
            best = min(best, time.perf_counter() - begin)
        return best

    replayed, python = host_seconds(model), host_seconds(lambda x: plain(model, x))
    print(f"host, us a call: replayed {1e6 * replayed:.0f}, from Python {1e6 * python:.0f}")
    assert replayed < python / 3

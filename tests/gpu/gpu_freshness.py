"""Weights that change behind PyTorch's back: calls, tapes and CUDA graphs follow them on the device."""

import threading

import pytest
import torch
from helpers.support import randomize_

import resnet_fast
from resnet_fast import backends, blocks

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def stage(gpu, dtype):
    return randomize_(blocks.Stage(blocks.BasicBlock(16, 32, 2), blocks.BasicBlock(32, 32)).eval()).to(gpu, dtype)


def network(gpu, name, dtype=torch.float16):
    return randomize_(getattr(resnet_fast, name)().eval()).to(gpu, dtype)


def images(gpu, name, batch, dtype=torch.float16):
    size = 32 if name.startswith("cifar") else 224
    return torch.randn(batch, 3, size, size, device=gpu, dtype=dtype)


def floats(model):
    return [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]


def change(model, factor=1.25):
    """Of everything; no version changes."""
    versions = [t._version for t in floats(model)]
    for t in floats(model):
        t.data.mul_(factor)
    assert [t._version for t in floats(model)] == versions


def packed_anew(model, x):
    resnet_fast.refresh(model)
    return model(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("replayed", [False, True], ids=["called", "replayed"])
@torch.no_grad()
def test_calls_follow(gpu, replayed, dtype):
    model, x = stage(gpu, dtype), torch.randn(2, 16, 8, 8, device=gpu, dtype=dtype)
    try:
        backends.cuda.replay = replayed
        before = [model(x) for _ in range(3)][-1]
        change(model)
        after = model(x)
    finally:
        backends.cuda.replay = True
    assert not torch.equal(before, after)
    assert torch.equal(after, packed_anew(model, x))


@pytest.mark.machine
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet18", "resnet50"])
@torch.no_grad()
def test_networks_follow(gpu, name, dtype):
    """With TF32, stages of cifar_resnet20 are fragments in float32, too."""
    torch.backends.cudnn.allow_tf32 = True
    model, x = network(gpu, name, dtype), images(gpu, name, 2, dtype)
    for _ in range(3):
        before = model(x)
    change(model, 1.05)
    after = model(x)
    assert not torch.equal(before, after)
    assert torch.equal(after, packed_anew(model, x))


def captured(call):
    """A CUDA graph of ``call()``, and what it writes."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    return graph, y


@pytest.mark.machine
@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet18"])
@torch.no_grad()
def test_a_graph_follows(gpu, name):
    """After uncounted changes, after counted ones, and after the host has packed anew and memory was used again."""
    model, x = network(gpu, name), images(gpu, name, 2)
    graph, y = captured(lambda: model(x))
    before = None
    for how in (lambda t: t.data.mul_(1.05), lambda t: t.mul_(0.9), lambda t: t.mul_(1.05)):
        for t in floats(model):
            how(t)
        graph.replay()
        out = y.clone()
        resnet_fast.refresh(model)
        want = model(x)  # packs elsewhere; the old copy must live on
        rubbish = [torch.full((1 << 20,), float("nan"), device=gpu) for _ in range(64)]
        torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
        assert before is None or not torch.equal(out, before)
        before = out
        del rubbish


@pytest.mark.machine
def test_a_captured_step_is_in_the_next_answer(gpu):
    """A training step in one graph, evaluation in another: the step counts nothing that the host could ask for."""
    model = network(gpu, "cifar_resnet20", torch.float32)
    x = images(gpu, "cifar_resnet20", 4, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(1e-3, device=gpu), momentum=0.9, fused=True)
    for p in model.parameters():
        p.grad = 1e-1 * torch.randn_like(p)

    def evaluate():
        with torch.no_grad():
            return model(x)

    step, _ = captured(optimizer.step)
    evaluation, y = captured(evaluate)
    seen = []
    for _ in range(3):
        step.replay()
        evaluation.replay()
        seen.append(y.clone())
        with torch.no_grad():
            torch.testing.assert_close(y, packed_anew(model, x), rtol=1e-4, atol=1e-4)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.machine
@torch.no_grad()
def test_streams_and_threads_share_a_model(gpu):
    """Each change is followed by calls on several streams at once, each of which may pack it."""
    model, x = network(gpu, "resnet18"), images(gpu, "resnet18", 1)
    streams = [torch.cuda.Stream() for _ in range(4)]

    def call(stream, results, i):
        with torch.no_grad(), torch.cuda.stream(stream):
            results[i] = model(x)

    for repeat in range(20):
        change(model, 1.01 if repeat % 2 else 1 / 1.01)
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        results = [None] * len(streams)
        threads = [threading.Thread(target=call, args=(s, results, i)) for i, s in enumerate(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for stream in streams:
            torch.cuda.current_stream().wait_stream(stream)
        want = packed_anew(model, x)
        assert all(torch.equal(y, want) for y in results), repeat


@pytest.mark.machine
@pytest.mark.alone
@torch.no_grad()
def test_what_comparing_takes(gpu):
    """As graphs, with and without: prints what docs/measurements/freshness.md does not know yet."""
    for name, batch in (("cifar_resnet32", 1), ("resnet18", 1), ("resnet50", 8)):
        model, x, seconds = network(gpu, name), images(gpu, name, batch), {}
        graphs = {}
        for check in (True, False):
            backends.cuda.check_weights = check
            try:
                graphs[check] = captured(lambda model=model, x=x: model(x))[0]
            finally:
                backends.cuda.check_weights = True
        for _ in range(20):
            for check, graph in graphs.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(50):
                    graph.replay()
                end.record()
                end.synchronize()
                seconds[check] = min(seconds.get(check, 1e9), begin.elapsed_time(end) / 50)
        print(f"{name}, batch {batch}: {1e3 * seconds[True]:.1f} us, without the check {1e3 * seconds[False]:.1f}")
        assert seconds[True] < 1.5 * seconds[False]

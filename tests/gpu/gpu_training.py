"""Training on the GPU: steps replayed from C++ give the bits of steps from Python, within graphs and on any stream."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F
from helpers.support import assert_error_rule, channels_last, randomize_

import resnet_fast
from resnet_fast import backends, reference
from resnet_fast.gpu.tape import Tape
from resnet_fast.program.captured_step import CapturedStep, CudaGraphs


@pytest.fixture(autouse=True)
def replays():
    yield
    backends.cuda.replay = True


def tapes_of(model):
    owners = [*model.modules(), *(m._whole for m in model.modules() if getattr(m, "_whole", None) is not None)]
    programs = [m._program for m in owners if getattr(m, "_program", None) is not None]
    return [tape for p in programs for tape in p.passes._replayed.tapes.found.values()]


def step(model, x, target, dtype):
    """Loss, gradients and buffers; the graph of the step is gone when it returns."""
    for p in model.parameters():
        p.grad = None
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        scores = model(x)
    loss = F.cross_entropy(scores.float(), target)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]


def images(gpu, batch, size, classes=10):
    return channels_last(torch.randn(batch, 3, size, size)).to(gpu), torch.arange(batch, device=gpu) % classes


def check_replay(gpu, model, x, target, dtype, steps=4):
    other = copy.deepcopy(model)
    for _ in range(steps):
        ours = step(model, x, target, dtype)
        backends.cuda.replay = False
        theirs = step(other, x, target, dtype)
        backends.cuda.replay = True
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    found = tapes_of(model)
    assert found
    assert all(isinstance(t, Tape) for t in found), found
    assert backends.fallbacks() == {}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None], ids=str)
def test_replayed_steps_of_a_small_network_give_the_same_bits(gpu, dtype):
    model = resnet_fast.CifarResNet(1).to(gpu).train()
    check_replay(gpu, model, *images(gpu, 4, 12), dtype)


@pytest.mark.machine
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("name", ["cifar_resnet20", "ResNet32", "resnet18", "resnet50"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None], ids=str)
def test_replayed_steps_give_the_same_bits(gpu, name, dtype, layout):
    model = getattr(resnet_fast, name)(num_classes=10).to(gpu, memory_format=layout).train()
    check_replay(gpu, model, *images(gpu, 8, 32 if name.startswith("cifar") else 64), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=str)
def test_a_step_errs_no_more_than_eager(gpu, dtype):
    fast = randomize_(resnet_fast.CifarResNet(1).train())
    twin = reference.CifarResNet(1).train()
    twin.load_state_dict(fast.state_dict())
    exact = copy.deepcopy(twin).double()
    fast, twin = fast.to(gpu), twin.to(gpu)
    x, target = images(gpu, 4, 12)
    for _ in range(3):
        ours = step(fast, x, target, dtype)
        theirs = step(twin, x, target, dtype)
        wanted = step(exact, x.cpu().double(), target.cpu(), None)
    assert all(isinstance(t, Tape) for t in tapes_of(fast))
    # One parameter of many may have a gradient that eager hits by luck: the rule is for all of them together.
    places = [i for i, t in enumerate(wanted) if t.is_floating_point() and t.dim() > 0]
    joined = [
        torch.cat([(each[i].cpu().double() / wanted[i].norm().clamp(min=1e-9)).flatten() for i in places])
        for each in (ours, theirs, wanted)
    ]
    assert_error_rule(joined[0].float(), joined[2], [joined[1].float()])


@pytest.mark.machine
def test_a_whole_step_in_a_graph(gpu):
    """Forward, backward and optimizer, captured after steps that were replayed, and replayed by CUDA."""
    model = resnet_fast.cifar_resnet20().to(gpu, memory_format=torch.channels_last).train()
    other = copy.deepcopy(model)
    x, target = images(gpu, 16, 32)
    batches = [torch.randn_like(x) for _ in range(4)]

    def made(m):
        optimizer = torch.optim.SGD(m.parameters(), 0.05, momentum=0.9)

        def run():
            optimizer.zero_grad(set_to_none=False)
            with torch.autocast("cuda", torch.bfloat16):
                scores = m(x)
            F.cross_entropy(scores.float(), target).backward()
            optimizer.step()

        return run

    run, plain = made(model), made(other)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(4):
        plain()
    for batch in batches:
        x.copy_(batch)
        graph.replay()
        plain()
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.machine
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None], ids=str)
def test_the_programs_captured_step(gpu, dtype, monkeypatch):
    """Two passes a step, another learning rate in each: the bits of steps without a graph."""

    def trained(m):
        optimizer = torch.optim.SGD(m.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        loss = torch.zeros((), device=gpu)

        def run_pass(x, target, last):
            with torch.autocast("cuda", dtype, enabled=dtype is not None):
                scores = m(x)
            found = F.cross_entropy(scores.float(), target)
            scaler.scale(found).backward()
            loss.add_(found.detach())

        steps = CapturedStep(m, optimizer, scaler, run_pass, CudaGraphs(torch.device(gpu, 0)), pytest.fail)
        for number, pair in enumerate(zip(batches[::2], batches[1::2], strict=True)):
            optimizer.param_groups[0]["lr"] = 0.05 / (number + 1)
            steps.run([(x, target) for x in pair])
            assert optimizer.param_groups[0]["lr"] == 0.05 / (number + 1)
        with torch.no_grad():
            scores = m.eval()(batches[0])
        return [loss, scores, *m.state_dict().values()], steps._replay

    model = resnet_fast.cifar_resnet20().to(gpu, memory_format=torch.channels_last).train()
    _, target = images(gpu, 16, 32)
    batches = [images(gpu, 16, 32)[0] for _ in range(20)]
    other = copy.deepcopy(model)
    ours, replay = trained(model)
    assert replay is not None
    monkeypatch.setattr(CapturedStep, "WARM_UP", 99)
    theirs, replay = trained(other)
    assert replay is None
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.machine
def test_graphed_callables(gpu):
    model = resnet_fast.cifar_resnet20().to(gpu, memory_format=torch.channels_last).train()
    other = copy.deepcopy(model)
    x, target = images(gpu, 16, 32)
    graphed = torch.cuda.make_graphed_callables(model, (x.clone(),))
    other.load_state_dict(model.state_dict())  # warming up has moved the statistics
    for _ in range(3):
        ours, theirs = step(graphed, x, target, None), step(other, x, target, None)
        assert torch.equal(ours[0], theirs[0])
    for p, q in zip(graphed.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.machine
def test_compiled_steps(gpu):
    torch._dynamo.reset()
    model = resnet_fast.cifar_resnet20().to(gpu, memory_format=torch.channels_last).train()
    other = copy.deepcopy(model)
    compiled = torch.compile(model, mode="reduce-overhead")
    x, target = images(gpu, 16, 32)
    for _ in range(5):
        ours, theirs = step(compiled, x, target, torch.bfloat16), step(other, x, target, torch.bfloat16)
        assert torch.allclose(ours[0], theirs[0], rtol=1e-2, atol=1e-2)
    assert backends.fallbacks() == {}


@pytest.mark.machine
def test_streams_and_scaled_gradients(gpu):
    model = resnet_fast.cifar_resnet20().to(gpu, memory_format=torch.channels_last).train()
    other = copy.deepcopy(model)
    x, target = images(gpu, 16, 32)
    side = torch.cuda.Stream()

    def train(m, stream):
        optimizer, scaler = torch.optim.SGD(m.parameters(), 0.05, fused=True), torch.amp.GradScaler("cuda")
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(5):
                optimizer.zero_grad()
                with torch.autocast("cuda", torch.float16):
                    scores = m(x)
                scaler.scale(F.cross_entropy(scores.float(), target)).backward()
                scaler.step(optimizer)
                scaler.update()
        torch.cuda.current_stream().wait_stream(stream)

    train(model, side)
    backends.cuda.replay = False
    train(other, torch.cuda.current_stream())
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.machine
def test_memory_comes_back(gpu):
    model = resnet_fast.resnet50(num_classes=10).to(gpu, memory_format=torch.channels_last).train()
    x, target = images(gpu, 8, 128)
    for _ in range(4):
        step(model, x, target, torch.bfloat16)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        step(model, x, target, torch.bfloat16)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.alone
@pytest.mark.machine
def test_peak_memory_and_host_time(gpu):
    """Of a step: no more memory than from Python and a tenth, and a third of the host's time."""
    model = resnet_fast.cifar_resnet32().to(gpu, memory_format=torch.channels_last).train()
    x, _ = images(gpu, 128, 32)
    parameters = list(model.parameters())

    def run():
        for p in parameters:
            p.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            maps = model.features(x)
        maps.backward(maps.detach())

    found = {}
    for replay in (True, False):
        backends.cuda.replay = replay
        for _ in range(4):
            run()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        best = float("inf")
        for _ in range(10):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - begin)
        torch.cuda.synchronize()
        found[replay] = best, torch.cuda.max_memory_allocated()
    (replayed, memory), (python, most) = found[True], found[False]
    print(f"host, us a step: replayed {1e6 * replayed:.0f}, from Python {1e6 * python:.0f}")
    print(f"peak, MB: replayed {memory / 1e6:.0f}, from Python {most / 1e6:.0f}")
    assert replayed < python / 3
    assert memory < 1.1 * most


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_eval_mode_with_gradients(gpu, dtype):
    """Fine-tuning with frozen statistics, and the images' gradient alone."""
    fast = randomize_(resnet_fast.CifarResNet(1).eval())
    twin = reference.CifarResNet(1).eval()
    twin.load_state_dict(fast.state_dict())
    exact, x = copy.deepcopy(twin).double(), torch.randn(4, 3, 12, 12)
    fast, twin = fast.to(gpu, dtype), twin.to(gpu, dtype)
    for frozen in (False, True):
        grads = []
        for m in (fast, twin, exact):
            m.requires_grad_(not frozen)
            own = x.to(next(m.parameters())).requires_grad_()
            for _ in range(3):
                found = torch.autograd.grad(
                    m.features(own).square().sum(), [own, *(() if frozen else m.parameters())], allow_unused=True
                )
            grads.append([g.cpu() for g in found if g is not None])
        joined = [
            torch.cat([(g.double() / w.norm()).flatten() for g, w in zip(each, grads[2], strict=True)])
            for each in grads
        ]
        assert_error_rule(joined[0].to(dtype), joined[2], [joined[1].to(dtype)])
    assert backends.fallbacks() == {}

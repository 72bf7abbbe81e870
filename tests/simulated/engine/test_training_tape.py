"""Training on the GPU path replayed from C++: the bits and the launches of passes whose launches come from Python."""

import contextlib
import copy

import pytest
import torch
from helpers.support import assert_error_rule, channels_last, randomize_, twins
from ptxsim.device import simulated
from torch import nn

import resnet_fast
from benchmarks.gpu import host
from benchmarks.gpu.host import Nothing
from resnet_fast import backends, blocks, reference
from resnet_fast.backends import launch
from resnet_fast.chain.training import function
from resnet_fast.chain.training import operator as train_chain
from resnet_fast.gpu import tune
from resnet_fast.gpu.recorder import Launch
from resnet_fast.gpu.tape import Tape, Tapes


@pytest.fixture(autouse=True)
def settings():
    yield
    backends.cuda.replay = True
    backends.training.recompute_outputs = False


def programs(model):
    owners = [*model.modules(), *(m._whole for m in model.modules() if getattr(m, "_whole", None) is not None)]
    kept = [getattr(m, name, None) for m in owners for name in ("_program", "_eval_program")]
    return [part for program in kept if program is not None for part in program._stages or [program]]


def tapes_of(model):
    """What is kept of each kind of pass."""
    return [tape for p in programs(model) for tape in p.passes._replayed.tapes.found.values()]


def step(model, x, autocast=None):
    """One step's results: output, gradients of input and parameters, buffers."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    for p in model.parameters():
        p.grad = None
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = model(x)
    y.float().square().sum().backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [y.detach(), x.grad, *grads, *(b.clone() for b in model.buffers())]


def same(ours, theirs):
    return all(
        a is b is None or (torch.equal(a, b) and a.stride() == b.stride()) for a, b in zip(ours, theirs, strict=True)
    )


def check_replay(model, device, shape, autocast=None, passes=2):
    """The third step is replayed and gives what the same step from Python gives. Returns the names of its launches."""
    inputs = [channels_last(torch.randn(shape)) for _ in range(3)]
    other, found = copy.deepcopy(model), []
    for m, replay in ((model, True), (other, False)):
        backends.cuda.replay = replay
        for x in inputs:
            device.launches.clear()
            results = step(m, x, autocast)
        found.append((results, [name for name, _ in device.launches]))
    backends.cuda.replay = True
    (ours, names), (theirs, wanted) = found
    assert [type(t) for t in tapes_of(model)] == [Tape] * passes, tapes_of(model)
    assert not tapes_of(other)
    assert same(ours, theirs)
    assert names == wanted != []
    assert backends.fallbacks() == {}
    return names


@pytest.mark.parametrize("library", [False, True], ids=["kernels", "library"])
@pytest.mark.parametrize("kind", ["Block", "BasicBlock", "Bottleneck"])
def test_a_block(simulated_device, kind, library):
    block = randomize_(getattr(blocks, kind)(16, 8, 2)).train()
    with tune.use(tune.LIBRARY) if library else contextlib.nullcontext():
        check_replay(block, simulated_device, (2, 16, 7, 6), torch.bfloat16)
    steps = [s for tape in tapes_of(block) for s in tape.steps]
    calls = {s.name for s in steps if not isinstance(s, Launch)}
    # Between kernels nothing of PyTorch's computes, but for the library's convolutions, and their biases.
    allowed = {"aten::conv2d", "aten::convolution_backward", *(["aten::to"] if kind == "Block" else [])}
    assert calls == (allowed if library else set())


def biased(block):
    for m in block.modules():
        if isinstance(m, nn.Conv2d):
            m.bias = nn.Parameter(torch.randn(m.out_channels))
    return block


def norms(block, change):
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            change(m)
    return block


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.half(),
        biased,
        lambda m: norms(biased(m), nn.Module.eval),
        lambda m: norms(m, lambda bn: setattr(bn, "momentum", None)),
        lambda m: norms(m, lambda bn: bn.register_parameter("weight", None) or bn.register_parameter("bias", None)),
        lambda m: m.conv1.requires_grad_(False) and m,
    ],
    ids=["channels_last", "float16", "biases", "frozen", "average", "no affine", "frozen weight"],
)
def test_kinds_of_parameters(simulated_device, change):
    block = change(randomize_(blocks.BasicBlock(8, 16, 2)).train())
    dtype = block.conv1.weight.dtype
    check_replay(nn.Sequential(block).to(dtype), simulated_device, (2, 8, 6, 6), torch.float16)


def test_outputs_formed_again(simulated_device):
    stage = randomize_(blocks.Stage(*(blocks.BasicBlock(8, 8) for _ in range(4)))).train()
    backends.training.recompute_outputs = True
    check_replay(stage, simulated_device, (2, 8, 6, 6), torch.bfloat16)


def test_a_network(simulated_device):
    """Stem, stages and pooling in two tapes, whose buffers of shared memory never hold two values at once."""
    names = check_replay(resnet_fast.CifarResNet(1).train(), simulated_device, (2, 3, 12, 12), torch.bfloat16)
    assert names.count("_conv_bn_stats_kernel") == names.count("_finalize_stats_kernel") == 9


def test_a_chain_cut_into_stages(simulated_device, monkeypatch):
    """As under DistributedDataParallel: two tapes a stage, which together compute what those of the chain do."""
    cut = randomize_(blocks.Stage(blocks.BasicBlock(8, 8), blocks.BasicBlock(8, 16, 2))).train()
    monkeypatch.setattr(function, "is_cut", lambda first: True)
    names = check_replay(cut, simulated_device, (2, 8, 4, 4), passes=4)
    assert [len(p.layers) for p in programs(cut)] == [2, 3]
    # One a stage: that of the whole chain reduces the gradient in between as a convolution writes it.
    assert names.count("_bn_backward_reduce_kernel") == 2
    whole, x = copy.deepcopy(cut), channels_last(torch.randn(2, 8, 4, 4))
    ours = step(cut, x)
    monkeypatch.undo()
    for a, b in zip(ours, step(whole, x), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_eager(simulated_device, monkeypatch):
    """Kept by the kernels, with a momentum that changes at every step; changes are counted as PyTorch counts them."""
    fast, eager = twins(blocks.BasicBlock, reference.BasicBlock, 8, 8)
    for m in (fast, eager):
        m.train()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    x = torch.randn(3, 8, 6, 6)
    for i in range(5):
        for m in (fast, eager):
            norms(m, lambda bn, i=i: setattr(bn, "momentum", 0.5 / (i + 1)))
        version = fast.bn1.running_mean._version
        step(fast, x)
        assert fast.bn1.running_mean._version > version
        step(eager, x)
    assert [type(t) for t in tapes_of(fast)] == [Tape] * 2  # not one for each momentum
    for (name, ours), theirs in zip(fast.named_buffers(), eager.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6), name
    assert fast.bn1.num_batches_tracked == 5


def test_parameters_that_move(simulated_device):
    """Other memory, another layout, one vector for all of them: what is replayed reads them where they are."""
    block = randomize_(blocks.BasicBlock(8, 16, 2)).train()
    x = channels_last(torch.randn(2, 8, 6, 6))
    for _ in range(3):
        step(block, x)

    def flat(m):
        own = list(m.parameters())
        vector = torch.cat([p.detach().flatten() for p in own])
        for p, part in zip(own, vector.split([p.numel() for p in own]), strict=True):
            p.data = part.view(p.shape)

    def shared(m):
        m.bn1.bias.data = m.bn1.weight.data

    for move in (
        lambda m: [setattr(p, "data", p.data.clone() * 1.25) for p in m.parameters()],
        flat,
        flat,
        shared,
        lambda m: setattr(m.bn1.bias, "data", m.bn1.bias.data.clone()),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: setattr(m.conv2.weight, "data", m.conv2.weight.data.to(torch.bfloat16).float()),
    ):
        with torch.no_grad():
            move(block)
        for _ in range(3):
            twin = copy.deepcopy(block)
            ours = step(block, x)
            backends.cuda.replay = False
            theirs = step(twin, x)
            backends.cuda.replay = True
            assert same(ours, theirs)
    assert all(isinstance(t, Tape) for t in tapes_of(block))


def test_other_gradients_have_tapes_of_their_own(simulated_device):
    block = randomize_(blocks.BasicBlock(8, 8)).train()
    x = channels_last(torch.randn(2, 8, 6, 6))
    block.conv2.weight.requires_grad_(False)
    for _ in range(3):
        part = step(block, x)
    assert block.conv2.weight.grad is None
    block.conv2.weight.requires_grad_(True)
    for _ in range(3):
        whole = step(block, x)
    assert torch.equal(whole[1], part[1])
    gradients = range(2, 2 + len(list(block.parameters())))
    assert [part[i] is None for i in gradients].count(True) == 1
    assert all(part[i] is None or torch.equal(whole[i], part[i]) for i in gradients)
    assert all(whole[i] is not None for i in gradients)


def test_a_graph_that_is_kept(simulated_device):
    block = randomize_(blocks.BasicBlock(8, 8)).train()
    x = channels_last(torch.randn(2, 8, 6, 6)).requires_grad_()
    for _ in range(3):
        y = block(x)
        first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(y.sum(), x)[0])
    y = block(x)
    with torch.no_grad():
        block.conv1.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    "make", [lambda m: m.BasicBlock(16, 8, 2), lambda m: m.CifarResNet(1)], ids=["block", "network"]
)
@pytest.mark.parametrize("frozen", [False, True], ids=["weights", "images"])
def test_eval_mode_with_gradients(simulated_device, monkeypatch, make, frozen):
    """By the kernels of training with given statistics; without work for gradients that nobody wants."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    fast, eager = randomize_(make(blocks if hasattr(make(reference), "bn2") else resnet_fast)), make(reference)
    eager.load_state_dict(fast.state_dict())
    for m in (fast, eager):
        m.eval().requires_grad_(not frozen)
    x = channels_last(torch.randn(2, 16 if hasattr(fast, "bn2") else 3, 12, 12))
    before = [b.clone() for b in fast.buffers()]
    for _ in range(3):
        simulated_device.launches.clear()
        ours = step(fast, x)
        names = [name for name, _ in simulated_device.launches]
    assert same(fast.buffers(), before)
    assert [type(t) for t in tapes_of(fast)] == [Tape] * 2
    assert ("_weight_gradient_kernel" in names) == (not frozen)
    assert {"_finalize_affine_kernel", "_data_gradient_kernel"} <= set(names)
    assert backends.fallbacks() == {}
    theirs, exact = step(eager, x), step(copy.deepcopy(eager).double(), x.double())
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert (a is None) == (b is None)
        if a is not None and a.is_floating_point():
            assert_error_rule(a, e, [b])


def test_errors_of_launches_come_through():
    block = randomize_(blocks.BasicBlock(8, 8)).train()
    x = channels_last(torch.randn(2, 8, 6, 6))
    with simulated() as device:
        for _ in range(3):
            step(block, x)
        device.limit = 10  # instructions
        with pytest.raises(Exception, match="instructions"):
            block(x)


def test_the_operator_of_compiled_training(simulated_device):
    """It replays its passes, too."""
    block = randomize_(blocks.BasicBlock(8, 16, 2)).train()
    x = channels_last(torch.randn(2, 8, 6, 6)).requires_grad_()
    step(block, x)
    (program,) = programs(block)
    for _ in range(2):
        results = []
        for backends.cuda.replay in (True, True, True, False):
            simulated_device.launches.clear()
            y, moments = program._traced(x, program._tensors())
            grads = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
            results.append([y.detach(), *moments, *grads, [name for name, _ in simulated_device.launches]])
        for other in results[1:]:
            assert other[-1] == results[0][-1]
            assert same(other[:-1], results[0][:-1])
    settings = ([t is not None for t in program._tensors()], program.fields, program.eps, program.batch)
    passes = train_chain._passes(*map(tuple, settings))
    assert [type(t) for t in passes._replayed.tapes.found.values()] == [Tape] * 2


def test_what_the_host_takes_is_measured():
    row = host.measure("cifar_resnet20", 1, torch.bfloat16, training=True)
    assert row["launches"] > 19 * 6
    assert row["tape"]["median"] < row["python"]["median"] / 2


def test_kinds_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(Tapes, "MOST", 4)
    block = blocks.BasicBlock(8, 8).train()
    with launch.use_device(Nothing()):
        for size in range(4, 14):
            for _ in range(3):
                block(channels_last(torch.randn(1, 8, size, 4)))
    assert [type(t) for t in tapes_of(block)] == [Tape] * 4

"""Tapes of chains: what is recorded of the calls from Python computes the same from C++, launch by launch."""

import random
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers.cuda_support import cuda_device
from helpers.stage_support import add_kernels
from helpers.support import randomize_
from ptxsim.compilers import compile_triton
from ptxsim.device import simulated
from ptxsim.sim import Kernel
from torch import nn

import resnet_fast
from benchmarks.gpu.host import Nothing
from resnet_fast import backends, blocks
from resnet_fast.backends import launch
from resnet_fast.backends.native import extension
from resnet_fast.gpu import recorder
from resnet_fast.gpu.recorder import LaunchRecorder
from resnet_fast.gpu.tape import Tape, record


@pytest.fixture
def tensor_cores(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


def tapes_of(model):
    """All that were made for a module, its parts and, where it is a network, the whole of it."""
    owners = [m._chain.gpu for m in model.modules() if getattr(m, "_chain", None)]
    owners += [model._network] if getattr(model, "_network", None) else []
    owners += [model._whole._chain.gpu] if getattr(model, "_whole", None) else []
    return [tape for owner in owners for tape in owner.tapes.found.values()]


def check_replay(module, shape, device, dtype=torch.float16, layout=torch.channels_last, tapes=1):
    """The third call is replayed, and gives the bits and the launches of a call from Python. Returns their names."""
    inputs = [torch.randn(shape).to(dtype).contiguous(memory_format=layout) for _ in range(2)]
    with torch.no_grad():
        module(inputs[0])
        module(inputs[0])
        assert len([t for t in tapes_of(module) if isinstance(t, Tape)]) == tapes, tapes_of(module)
        found = []
        for replay in (True, False):
            backends.cuda.replay = replay
            device.launches.clear()
            found.append((module(inputs[1]), [name for name, _ in device.launches]))
        backends.cuda.replay = True
    (out, names), (want, wanted) = found
    assert torch.equal(out, want)
    assert out.stride() == want.stride()
    assert names == wanted != []
    assert backends.fallbacks() == {}
    return names


@pytest.fixture(autouse=True)
def replays():
    yield
    backends.cuda.replay = True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "nchw"])
def test_a_stage_in_triton(simulated_device, dtype, layout):
    stage = randomize_(blocks.Stage(blocks.BasicBlock(8, 16, 2), blocks.BasicBlock(16, 16))).eval().to(dtype)
    check_replay(stage, (2, 8, 6, 6), simulated_device, dtype, layout)


@pytest.mark.parametrize("bias", [True, False])
def test_what_the_driver_is_given(bias):
    """Of a kernel as Triton compiled it: its parameters, in number and order as its code has them."""
    from resnet_fast._triton import conv_bn_relu as kernels
    from resnet_fast.gpu.layer import layer_of

    y = torch.zeros(1, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    sums, vector = torch.zeros(2, 16, 16), torch.zeros(16)
    layer = layer_of((1, 8, 4, 4), (16, 3, 3), (1, 1), (1, 1), torch.float32, residual=False, relu=True)
    assert layer.pixels == 16
    seen = []

    class Compiling(Nothing):
        def triton(self, kernel, grid, args, meta, reaches=()):
            seen.append(compile_triton(kernel, *args, **meta)[0])

    with launch.use_device(Compiling()):
        kernels.epilogue(sums, vector, vector, y if bias else None, y, True, 2)
    (binary,) = seen
    compiled, passed = launch.gpu.compiled_triton(binary.compiled)
    assert passed == binary.passed == ("partial", "scale", "shift", *(("residual",) if bias else ()), "y", "pixels")
    assert compiled.parameters[0] == "*fp32"
    assert compiled.parameters[-1] == "i32"
    parameters = Kernel(binary.ptx, binary.name).info["params"]
    assert len(parameters) == len(passed) + compiled.scratch_pointers
    assert [size for _, size in parameters[len(passed) :]] == [8] * compiled.scratch_pointers
    assert compiled.threads == binary.threads == 128


def test_split_sums_in_triton(simulated_device):
    from resnet_fast.gpu.candidates.triton import Config
    from resnet_fast.gpu.tune import use

    block = randomize_(blocks.BasicBlock(16, 16)).eval().half()
    with use(Config(16, 16, 16, num_warps=1, num_stages=2, split_k=3)):
        check_replay(block, (1, 16, 4, 4), simulated_device)
    assert [len(t.steps) for t in tapes_of(block) if isinstance(t, Tape)] == [5]  # and the check of the weights


def test_the_librarys_convolution(simulated_device):
    """A call of PyTorch's between launches, whose result is read and written by the next one."""
    from resnet_fast.gpu.tune import LIBRARY, use

    stage = randomize_(blocks.Stage(blocks.BasicBlock(8, 16, 2), blocks.BasicBlock(16, 16))).eval()
    with use(LIBRARY):
        check_replay(stage, (2, 8, 6, 6), simulated_device, torch.float32)


def test_a_network():
    """One tape from the images to the scores: the stem with its pooling, stages, split sums, pooling and the head."""
    model = randomize_(resnet_fast.models.ResNet([1, 1, 1, 1], 7)).eval().half()
    with cuda_device() as device:
        names = check_replay(model, (1, 3, 45, 33), device)
    assert len([name for name in names if name.startswith("conv_bn_relu_fwd_kernel<")]) == 2 * 4 + 3
    assert len([name for name in names if name.startswith("conv_bn_relu_pool_fwd_kernel<")]) == 1
    assert names.count("_refresh_filters_kernel") == 1  # of all chains together
    assert [type(t) for t in model._network.tapes.found.values()] == [Tape]


def test_a_network_at_a_launch_a_stage(simulated_device, tensor_cores):
    add_kernels(simulated_device)
    model = randomize_(resnet_fast.cifar_resnet20()).eval().half()
    names = check_replay(model, (2, 3, 32, 32), simulated_device)
    assert [name.split("_")[2] for name in names] == ["filters", "stem", "strided", "strided"]
    assert [type(t) for t in model._network.tapes.found.values()] == [Tape]


@torch.no_grad()
def test_what_ends_the_tape_of_a_network():
    """Hooks, modes, weights and modules of other code on the way are seen at the next call."""
    model = randomize_(resnet_fast.models.ResNet([1, 1, 1, 1], 7)).eval()
    x = torch.randn(1, 3, 33, 33)
    with launch.use_device(Nothing()):

        def replayed():
            """Whether calls are, from the third one on."""
            for _ in range(3):
                model(x)
            return [type(t) for t in model._network.tapes.found.values()] == [Tape]

        assert replayed()
        with backends.use("eager"):
            assert model(x).isfinite().all()  # computed, not what memory held
        calls = []
        handle = model.layer2[0].conv1.register_forward_hook(lambda *_: calls.append(1))
        assert not replayed()
        assert len(calls) == 3
        handle.remove()
        assert replayed()

        class Counting(nn.Identity):
            def forward(self, x):
                calls.append(1)
                return x

        pool, model.avgpool = model.avgpool, nn.Sequential(Counting(), model.avgpool)
        assert not replayed()
        assert len(calls) == 6
        model.avgpool = pool
        assert replayed()
        model.layer1[0].bn1.train()
        assert not replayed()
        assert model.layer1[0].bn1.num_batches_tracked == 3
        model.layer1[0].bn1.eval()
        assert replayed()
        model.layer2[0].training = True
        assert not replayed()
        model.layer2[0].training = False
        assert replayed()
        before = model._network.tapes
        model.fc.weight.mul_(2)
        assert replayed()
        assert model._network.tapes is not before
        with torch.enable_grad():
            model(x).sum().backward()
        assert model.fc.weight.grad is not None


@torch.no_grad()
def test_a_replica_has_a_network_of_its_own():
    """DataParallel copies attributes, the network among them: its tapes would answer with the first's weights."""
    model = randomize_(resnet_fast.models.ResNet([1, 1, 1, 1], 7)).eval()
    x = torch.randn(1, 3, 33, 33)
    with launch.use_device(Nothing()):
        for _ in range(3):
            model(x)
        assert [type(t) for t in model._network.tapes.found.values()] == [Tape]
        replica, calls = model._replicate_for_data_parallel(), []
        replica.fc = nn.Linear(512, 7)
        replica.fc.register_forward_hook(lambda *_: calls.append(1))
        for count in range(1, 5):
            replica(x)
            assert len(calls) == count
        owned = model._network
        model(x)
        assert model._network is owned


def test_other_inputs_have_tapes_of_their_own(simulated_device):
    block = randomize_(blocks.BasicBlock(8, 8)).eval()
    for count, shape in enumerate([(1, 8, 4, 4), (2, 8, 4, 4), (1, 8, 5, 3)], 1):
        check_replay(block, shape, simulated_device, torch.float32, tapes=count)
    big = torch.randn(1, 8, 4, 4 * 4).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for part in (big[..., :4], big[..., 4:8], big[..., 1:5], big[..., 4:8]):  # a slice is copied first
            assert torch.equal(block(part), block(part.contiguous(memory_format=torch.channels_last)))


def test_weights_that_change_end_a_tape(simulated_device):
    block = randomize_(blocks.BasicBlock(8, 8)).eval()
    x = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        before = [block(x) for _ in range(3)][2]
        block.conv1.weight.mul_(2)
        after = [block(x) for _ in range(4)]
    assert not torch.equal(before, after[0])
    assert all(torch.equal(a, after[0]) for a in after)


def test_a_tape_goes_with_its_chain(simulated_device):
    block = randomize_(blocks.BasicBlock(8, 8)).eval()
    x = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        for _ in range(3):
            block(x)
    (tape,) = tapes_of(block)
    number, gone = tape.number, weakref.ref(tape)
    assert torch.equal(torch.ops.resnet_fast.run_tape([x], number)[0], tape.run([x])[0])
    del tape
    resnet_fast.refresh(block)
    with torch.no_grad():
        block(x)
    assert gone() is None
    with pytest.raises(RuntimeError, match=f"there is no tape {number}"):
        torch.ops.resnet_fast.run_tape([x], number)


def test_errors_of_launches_come_through():
    """A fault that the simulator finds in a replayed launch is what the call raises."""
    block = randomize_(blocks.BasicBlock(8, 8)).eval()
    x = torch.randn(1, 8, 4, 4)
    with simulated() as device, torch.no_grad():
        for _ in range(3):
            block(x)
        device.limit = 10  # instructions
        with pytest.raises(Exception, match="instructions"):
            block(x)


def recorded(run, x=None):
    x = torch.ones(2, 3) if x is None else x
    with simulated():
        (y,), tape = record([x], lambda: [run(x)])
    return y, tape


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda x: torch.empty(3).fill_(1), "aten::fill_ in a chain"),
        (lambda x: x.add_(1), "aten::add_ in a chain"),
        (lambda x: torch.add(x, x, alpha=2), "argument 2 of type"),
        (lambda x: x.to(torch.complex64), "argument torch.complex64"),
        (lambda x: x.split(1)[0] + 1, "aten::split in a chain"),
        (lambda x: F.max_pool2d(x[None], 2, return_indices=True)[1].clone(), "indices of max pooling"),
        (lambda x: x, "a result that nothing computed"),
        (lambda x: torch.empty(4, 4)[1], "a part of what was computed"),
        (lambda x: x + (1 if x.sum() > 0 else 2), "argument"),
    ],
)
def test_what_cannot_be_replayed_is_not(run, reason):
    _, why = recorded(run)
    assert isinstance(why, str)
    assert reason in why


def test_calls_of_pytorchs():
    """Arguments of every kind that a tape takes: none, tensors, views of them, integers, lists, booleans, formats."""
    weight, bias = torch.randn(4, 3, 3, 3), torch.randn(4)
    matrix, row = torch.randn(5, 16), torch.randn(5)

    def run(x):
        y = F.conv2d(x, weight, bias, padding=1).contiguous(memory_format=torch.channels_last)
        z = torch.relu(F.conv2d(y[:, 1:], weight, None, stride=(2, 1)))
        pooled = F.avg_pool2d(F.max_pool2d(z, 2, 1), 1)[:, :2].clone(memory_format=torch.contiguous_format)
        return F.softmax(F.linear(pooled.flatten(1), matrix, row), dim=1).mean(0, keepdim=True)

    x = torch.randn(2, 3, 7, 7)
    _, tape = recorded(run, x)
    assert isinstance(tape, Tape), tape
    other = torch.randn_like(x)
    assert torch.equal(tape.run([other])[0], run(other))


def test_factors_are_not_taken_for_ones():
    """A product's factors of 1 are left out; others have a type that a tape does not carry."""
    weight = torch.randn(3, 3)
    _, why = recorded(lambda x: torch.addmm(x, x[:, :2], weight[:2], beta=2), torch.randn(2, 3))
    assert "argument 2 of type" in why


def test_inputs_of_another_kind_give_nothing():
    _, tape = recorded(lambda x: torch.relu(x), torch.randn(2, 3))
    assert len(tape.run([torch.randn(2, 3)])) == 1
    for wrong in (torch.randn(3, 2), torch.randn(3, 2).t(), torch.randn(2, 3).double(), torch.randn(7)[1:].view(2, 3)):
        assert tape.run([wrong]) == []
    assert tape.run([]) == tape.run([torch.randn(2, 3)] * 2) == []


def test_several_inputs_and_outputs():
    """In memory of their own and in shared memory, given twice, in other dtypes; results of one call, or none."""
    grad, x, flat = torch.randn(2, 4, 5, 5), torch.randn(2, 3, 5, 5), torch.randn(200)

    def run(grad, x, weight, bias, same):
        dx, dw, nothing = torch.ops.aten.convolution_backward(
            *(grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
        )
        assert nothing is None
        wide = (x.double() * x.double()).float()
        return [dx, wide, torch.relu(bias) * same[:1], dw.contiguous(memory_format=torch.channels_last)]

    def inputs(flat):
        weight, bias = flat[:108].view(4, 3, 3, 3), flat[108:112]
        return [torch.randn_like(grad), torch.randn_like(x), weight, bias, bias]

    with simulated():
        first = inputs(flat)
        _, tape = record(first, lambda: run(*first), closed=True)
        assert isinstance(tape, Tape), tape
        for other in (inputs(torch.randn(200)), inputs(torch.randn(300)[64:])):
            outputs = tape.run(other)
            for ours, wanted in zip(outputs, run(*other), strict=True):
                assert torch.equal(ours, wanted)
                assert ours.stride() == wanted.stride()
        *most, bias, _ = inputs(flat)
        assert tape.run([*most, bias, bias.clone()]) == []  # what shared memory does so no more
        assert len(tape.run([*(t.clone() for t in most), bias, bias])) == 4


def test_a_constant_in_a_closed_recording():
    x, constant = torch.ones(2, 3), torch.ones(3)
    with simulated():
        _, why = record([x], lambda: [torch.mul(x, constant)], closed=True)
    assert why == "a constant of shape (3,)"


@pytest.mark.parametrize("cut", [0, 1, 5, -1])
def test_words_that_are_no_tape_are_refused(cut):
    words = torch.arange(40, dtype=torch.int64).numpy().tobytes()
    with pytest.raises(RuntimeError, match="tape: "):
        extension.tape(words[: 8 * cut] if cut >= 0 else words, False)


def test_scratch_memory_is_shared_by_those_that_never_meet():
    """And by no others: places of random buffers, whose first and last steps are known."""
    chance = random.Random(0)
    for _ in range(200):
        buffers = []
        for _ in range(chance.randrange(1, 12)):
            b = recorder.Buffer(recorder._SCRATCH, 0, chance.randrange(0, 5000), chance.randrange(10))
            b.last = b.first + chance.randrange(4)
            buffers.append(b)
        total = recorder.arrange(buffers)
        for i, a in enumerate(buffers):
            assert a.place % 512 == 0
            assert a.place + a.bytes <= total
            for b in buffers[:i]:
                meet = a.first <= b.last and b.first <= a.last
                overlap = a.place < b.place + b.bytes and b.place < a.place + a.bytes
                assert not (meet and overlap)
        assert total <= sum(-(-b.bytes // 512) * 512 for b in buffers)


def test_recording_ends_with_its_block():
    x = torch.ones(2)
    with simulated(), pytest.raises(ZeroDivisionError), LaunchRecorder(x):
        1 / 0  # noqa: B018
    assert launch._this_thread.recorder is None

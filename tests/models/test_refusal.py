"""Running unfused costs next to nothing: why is asked once, and again when something on which that depends changed."""

import sys
from pathlib import Path

import pytest
import torch
from helpers.changes import UNFUSED_AFTERWARDS, pair_of_blocks
from helpers.support import assert_same_model, twins
from ptxsim.device import simulated
from torch import nn

import resnet_fast
from benchmarks.cases import UNFUSED
from resnet_fast import backends, blocks, reference
from resnet_fast.chain.record import ChainRecorder

PACKAGE = str(Path(resnet_fast.__file__).parent)
X = (2, 16, 7, 7)


def work(call):
    """How many functions of the package ``call`` runs, and how many recorders it makes."""
    names = []

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            names.append(frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return len(names), sum(name.endswith("Recorder.__init__") or name == "parts" for name in names), names


# What a block asks: fused, _refusal, selected, is_valid, is_simulated, is_valid, _declined, label, decline.
FEW = 10


@pytest.mark.parametrize("name", UNFUSED_AFTERWARDS)
@torch.no_grad()
def test_the_reason_is_asked_for_once(name):
    fast, eager = pair_of_blocks()
    x = torch.randn(X)
    change, reason = UNFUSED_AFTERWARDS[name]
    for m in (fast, eager):
        change(m)
    first = work(lambda: fast.fused(x))[0]
    if name == "pruning":  # its hook makes a new attribute at every call of the convolution, which changes nothing here
        fast(x)
    calls, recorded, names = work(lambda: fast.fused(x))
    assert calls <= FEW < first, names
    assert recorded == 0
    backends.fallbacks(clear=True)
    assert torch.equal(fast(x), eager(x))
    ((shown, times),) = backends.fallbacks().items()
    assert reason in shown
    assert times == 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("images", [1, 6])
@torch.no_grad()
def test_a_network_that_runs_unfused_in_every_block(images, training):
    fast, _ = twins(resnet_fast.cifar_resnet20, reference.cifar_resnet20)
    for m in fast.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(lambda *_: None)
    fast.train(training)
    x = torch.randn(images, 3, 16, 16)
    fast(x)
    calls, recorded, names = work(lambda: fast(x))
    attempts = 1 + 3 + 9 + 1  # the stem, stages, blocks, and the network as a whole
    assert calls <= (FEW + 6) * attempts, names
    assert recorded == 0
    backends.fallbacks(clear=True)
    fast(x)
    assert sum(backends.fallbacks().values()) == 1 + 3 + 9


def relu(m):
    m.relu1 = nn.Sigmoid()
    return lambda: setattr(m, "relu1", nn.ReLU())


def setting(module, name, value):
    def change(m):
        part, before = m.get_submodule(module), getattr(m.get_submodule(module), name)
        setattr(part, name, value)
        return lambda: setattr(part, name, before)

    return change


def norm_goes_on(m):
    m.bn2.train()
    return m.bn2.eval


def forward_of_its_own(m):
    m.conv1.forward = m.conv1.forward
    return lambda: delattr(m.conv1, "forward")


def no_statistics(m):
    mean = m.bn1.running_mean
    m.bn1.running_mean = None
    return lambda: setattr(m.bn1, "running_mean", mean)


def another_in_between(m):
    m.downsample = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Tanh())
    return lambda: setattr(m, "downsample", None)


class Wrapped(torch.Tensor):
    pass


def another_class_of_tensor(m):
    m.conv1.weight.__class__ = Wrapped
    return lambda: setattr(m.conv1.weight, "__class__", nn.Parameter)


# Each ends the fusion and returns what undoes it.
UNDONE = {
    "hook": lambda m: m.conv2.register_forward_hook(lambda *_: None).remove,
    "backward hook": lambda m: m.bn1.register_full_backward_hook(lambda *_: None).remove,
    "activation": relu,
    "padding mode": setting("conv1", "padding_mode", "circular"),
    "dilation": setting("conv1", "dilation", (2, 2)),
    "groups": setting("conv2", "groups", 2),
    "norm in training mode": norm_goes_on,
    "forward": forward_of_its_own,
    "no statistics": no_statistics,
    "another module": another_in_between,
    "class of a module": setting("conv1", "__class__", type("Conv", (nn.Conv2d,), {})),
    "class of a tensor": another_class_of_tensor,
}


@pytest.mark.parametrize("name", UNDONE)
@torch.no_grad()
def test_it_runs_fused_again_when_the_reason_is_gone(name):
    fast, eager = pair_of_blocks()
    x = torch.randn(X)
    undo = UNDONE[name](fast)
    assert [fast.fused(x) for _ in range(2)] == [None, None]
    undo()
    with backends.use("cpu"):
        assert_same_model(fast, eager, x)


@pytest.mark.parametrize("first", UNDONE)
@torch.no_grad()
def test_the_next_reason_is_found_when_the_first_is_gone(first):
    fast, _ = pair_of_blocks()
    x = torch.randn(X)
    undo = UNDONE[first](fast)
    fast.fused(x)
    fast.bn2.register_forward_pre_hook(lambda *_: None)
    undo()
    backends.fallbacks(clear=True)
    assert fast.fused(x) is None
    assert backends.fallbacks() == {"Block: a hook on a BatchNorm2d": 1}


@torch.no_grad()
def test_weights_of_a_dtype_without_a_kernel():
    """In float16 there is none on CPUs, and one on GPUs; PyTorch changes the dtype of the same parameters."""
    fast, _ = twins(blocks.BasicBlock, reference.BasicBlock, 16, 16)
    x = torch.randn(X)
    with torch.autocast("cpu", torch.bfloat16):
        fast.half()
        for _ in range(2):
            assert fast.fused(x) is None
        assert list(backends.fallbacks()) == ["BasicBlock: no kernel for torch.float16"]
        with simulated() as launches:
            assert fast.fused(x.half()) is not None
        assert launches.launches
        resnet_fast.refresh(fast)  # weights of a real GPU would not be on the CPU again
        assert fast.fused(x) is None
        fast.float()
        assert fast.fused(x) is not None


@torch.no_grad()
def test_a_backend_that_is_named_raises_the_reason_that_is_known():
    fast, _ = pair_of_blocks()
    x = torch.randn(X)
    UNDONE["activation"](fast)
    fast.fused(x)
    with backends.use("cpu"), pytest.raises(RuntimeError, match="Sigmoid where a ReLU was"):
        fast(x)
    backends.fallbacks(clear=True)
    with backends.use("eager"):
        fast(x)
    assert list(backends.fallbacks()) == ["Block: backends.use('eager')"]


@torch.no_grad()
def test_refresh_asks_again():
    fast, _ = pair_of_blocks()
    x = torch.randn(X)
    UNDONE["activation"](fast)
    fast.fused(x)
    refusal = fast._chain
    assert fast.fused(x) is None
    assert fast._chain is refusal
    resnet_fast.refresh(fast)
    assert fast.fused(x) is None
    assert fast._chain is not refusal


@torch.no_grad()
def test_a_reason_of_each_mode():
    fast, eager = pair_of_blocks()
    x = torch.randn(X)
    fast.bn1.train()
    eager.bn1.train()
    assert fast.fused(x) is None
    fast.train()
    eager.train()
    with backends.use("cpu"):
        assert torch.allclose(fast(x), eager(x), rtol=1e-3, atol=1e-4)
    assert ChainRecorder().reason([]) == "no convolutions"


@torch.no_grad()
def test_the_benchmark_runs_unfused_in_all_of_its_blocks():
    case = min(UNFUSED, key=lambda case: case.size)
    fast, x = case.build().fast(), case.input("photographs")
    with backends.use("cpu"):
        fast(x)
    assert sum(backends.fallbacks().values()) == 1 + 3 + 9

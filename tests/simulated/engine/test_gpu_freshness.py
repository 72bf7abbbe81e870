"""Weights that change behind PyTorch's back while a chain runs on a GPU: calls, tapes and captures follow them."""

import ast
import copy
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.changes import fill
from helpers.cuda_support import find_cuda
from helpers.stage_support import add_kernels
from helpers.support import randomize_
from ptxsim.device import simulated

import resnet_fast
from resnet_fast import backends, blocks
from resnet_fast.gpu import freshness, tune
from resnet_fast.gpu.tape import Tape, Tapes


@pytest.fixture(autouse=True)
def replays():
    yield
    backends.cuda.replay = True


REFRESH = "_refresh_filters_kernel"


def through_storage(t, values):
    t.untyped_storage().copy_(values.contiguous().untyped_storage())


def through_memory(t, values):
    """As another process, or a kernel of another library."""
    bytes_of = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_char * t.nbytes).from_address(t.data_ptr()))
    bytes_of[...] = np.frombuffer(values.contiguous().view(torch.uint8).numpy().tobytes(), bytes_of.dtype)


WAYS = {
    "data": lambda t, values: t.data.copy_(values),
    "numpy": lambda t, values: t.detach().view(torch.uint8).numpy().__setitem__(..., values.view(torch.uint8).numpy()),
    "storage": through_storage,
    "memory": through_memory,
}


def change(model, way="data"):
    """All weights and statistics, to others near by; no version changes."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    versions = [t._version for t in tensors]
    for i, t in enumerate(tensors):
        WAYS[way](t, (t.detach() * (1 + 0.3 * fill(t, i))).to(t.dtype))
    assert [t._version for t in tensors] == versions


def packed_anew(model, x):
    """What a model answers that has packed just now."""
    resnet_fast.refresh(model)
    return model(x)


def block(dtype=torch.float32):
    return randomize_(blocks.Stage(blocks.BasicBlock(8, 16, 2), blocks.BasicBlock(16, 16))).eval().to(dtype)


def tapes_of(model):
    return [t for t in model._chain.gpu.tapes.found.values() if isinstance(t, Tape)]


def names(device):
    found = [name for name, _ in device.launches]
    device.launches.clear()
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("replayed", [False, True], ids=["called", "replayed"])
@torch.no_grad()
def test_every_way(simulated_device, replayed, way):
    check(simulated_device, replayed, way, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_every_dtype(simulated_device, dtype):
    check(simulated_device, True, "data", dtype)


def check(device, replayed, way, dtype):
    model, x = block(dtype), torch.randn(1, 8, 4, 4).to(dtype)
    backends.cuda.replay = replayed
    before = [model(x) for _ in range(3)][-1]
    chain = model._chain
    for _ in range(2):
        change(model, way)
        names(device)
        y = model(x)
        assert model._chain is chain  # the host saw nothing
        assert names(device).count(REFRESH) == 1
        assert len(tapes_of(model)) == replayed
        assert torch.equal(y, model(x))
        assert not torch.equal(y, before)
        before = y
    assert torch.equal(before, packed_anew(model, x))
    assert model._chain is not chain
    assert backends.fallbacks() == {}


@torch.no_grad()
def test_autocast(simulated_device):
    """float32 weights packed in float16."""
    model, x = block(), torch.randn(1, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        before = [model(x) for _ in range(3)][-1]
        change(model)
        y = model(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, packed_anew(model, x))
        assert not torch.equal(y, before)


@torch.no_grad()
def test_a_whole_network_from_images_to_scores(simulated_device, monkeypatch):
    """One chain of stages with a head, as one tape."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    add_kernels(simulated_device)
    model, x = randomize_(resnet_fast.cifar_resnet20()).eval().half(), torch.randn(1, 3, 32, 32).half()
    before = [model(x) for _ in range(3)][-1]
    assert [type(t) for t in model._network.tapes.found.values()] == [Tape]
    change(model)
    names(simulated_device)
    y = model(x)
    assert [type(t) for t in model._network.tapes.found.values()] == [Tape]
    assert [name.split("_")[2] for name in names(simulated_device)] == ["filters", "stem", "strided", "strided"]
    assert torch.equal(y, packed_anew(model, x))
    assert not torch.equal(y, before)


@torch.no_grad()
def test_two_sizes_share_filters(simulated_device):
    model = block()
    inputs = [torch.randn(1, 8, 4, 4), torch.randn(1, 8, 6, 6)]
    for x in inputs:
        model(x)
    change(model)
    outs = [model(x) for x in inputs]
    first, second = model._chain.gpu._made.values()
    assert first.follower is second.follower
    assert all(torch.equal(y, packed_anew(model, x)) for x, y in zip(inputs, outs, strict=True))


@torch.no_grad()
def test_as_many_sizes_as_tapes_are_kept(simulated_device, monkeypatch):
    """A size that comes back after others follows as before."""
    monkeypatch.setattr(Tapes, "MOST", 2)
    monkeypatch.setattr(backends.cuda, "replay", False)
    first, second, network = block(), block(), freshness.RefreshedNetwork()
    second[0] = randomize_(blocks.BasicBlock(16, 16)).eval()

    def run(x):
        return network.run(x.shape, lambda: second(first(x)))

    for size in (2, 3, 4, 5, 2):
        x = torch.randn(1, 8, size, size)
        run(x)
        change(first)
        y = run(x)
        assert torch.equal(y, copy.deepcopy(second)(copy.deepcopy(first)(x)))
        assert max(len(network._made), len(first._chain.gpu._made)) <= 2
    assert len({id(following) for following, _ in network._made.values()}) == 1


@torch.no_grad()
def test_tapes_of_chains_that_a_network_has_refreshed(simulated_device):
    """They have no check of their own: the same chains called alone need other tapes, and the network these."""
    first, second = block(), randomize_(blocks.BasicBlock(16, 16)).eval()
    network, x = freshness.RefreshedNetwork(), torch.randn(1, 8, 4, 4)

    def forward():
        return network.run((), lambda: second(first(x)))

    for call, checks in ((forward, [5, 1, 1, 1]), (lambda: first(x), [1, 1, 1]), (forward, [1])):
        for wanted in checks:
            change(first)
            names(simulated_device)
            y = call()
            assert names(simulated_device).count(REFRESH) == wanted
            copied = copy.deepcopy(torch.nn.Sequential(first, second))  # packs anew
            assert torch.equal(y, copied(x) if call is forward else copied[0](x))
    assert len(tapes_of(first)) == 2
    assert len(tapes_of(second)) == 1


@torch.no_grad()
def test_the_switch(simulated_device, monkeypatch):
    model, x = block(), torch.randn(1, 8, 4, 4)
    monkeypatch.setattr(backends.cuda, "check_weights", False)
    before = [model(x) for _ in range(3)][-1]
    change(model)
    assert REFRESH not in names(simulated_device)
    assert torch.equal(model(x), before)  # as the documents say
    monkeypatch.setattr(backends.cuda, "check_weights", True)
    y = model(x)
    assert torch.equal(y, packed_anew(model, x))
    assert not torch.equal(y, before)


@torch.no_grad()
def test_without_triton_only_what_pytorch_counts(monkeypatch):
    model, x = block(), torch.randn(1, 8, 4, 4)
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    with simulated(find_cuda=find_cuda) as device:
        before = model(x)
        assert REFRESH not in names(device)
        change(model)
        assert torch.equal(model(x), before)
        model[0].conv1.weight.mul_(1)
        assert not torch.equal(model(x), before)


def ptxas_error():
    """An assembler older than the GPU."""
    from triton.runtime.errors import PTXASError

    return PTXASError("no such target")


def compilation_error():
    from triton.compiler.errors import CompilationError

    return CompilationError("", ast.Pass(lineno=1, col_offset=0), "no such target")


@pytest.mark.parametrize(
    "error",
    [lambda: RuntimeError("no C compiler"), ptxas_error, compilation_error],
    ids=["C compiler", "ptxas", "compiler"],
)
@torch.no_grad()
def test_where_triton_cannot_compile(monkeypatch, error):
    """What runs without Triton runs, and a warning says what it lacks."""
    model, x = block(), torch.randn(1, 8, 4, 4)
    monkeypatch.setattr(freshness, "_failed", False)
    with simulated(find_cuda=find_cuda) as device, backends.use("cuda"):
        monkeypatch.setattr(device, "triton", raising(error()))
        with pytest.warns(UserWarning, match=r"only if PyTorch counts the change(?s:.*)no (C compiler|such target)"):
            before = model(x)
        assert torch.equal(model(x), before)
        model[0].conv1.weight.mul_(1.5)
        assert not torch.equal(model(x), before)


def raising(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
@torch.no_grad()
def test_an_error_of_the_device_is_no_error_of_the_compiler(monkeypatch, error):
    model, x = block(), torch.randn(1, 8, 4, 4)
    with simulated(find_cuda=find_cuda) as device, backends.use("cuda"):
        with monkeypatch.context() as context:
            context.setattr(device, "triton", raising(error("out of memory")))
            with pytest.raises(error, match="out of memory"):
                model(x)
        before = model(x)
        change(model)
        assert not torch.equal(model(x), before)


@torch.inference_mode()
def test_inference_mode(simulated_device):
    """With weights made in it, of which PyTorch counts nothing."""
    model, x = block(), torch.randn(1, 8, 4, 4)
    before = [model(x) for _ in range(3)][-1]
    for p in model.parameters():
        p.mul_(1.25)
    y = model(x)
    assert not torch.equal(y, before)
    assert torch.equal(y, packed_anew(model, x))


def capturing(monkeypatch, captures):
    monkeypatch.setattr(tune, "capturing", lambda: captures)


@pytest.mark.parametrize("check", [True, False], ids=["compared", "not compared"])
@torch.no_grad()
def test_a_capture_holds_the_check_and_what_it_reads(simulated_device, monkeypatch, check):
    """After an uncounted change its replay follows; after a counted one the host packs anew, elsewhere, and what the
    graph reads must live on."""
    monkeypatch.setattr(backends.cuda, "replay", False)
    monkeypatch.setattr(backends.cuda, "check_weights", check)
    model, x = block(), torch.randn(1, 8, 4, 4)
    model(x)
    (filters,) = model._chain.gpu._made.values()
    held = [weakref.ref(t.untyped_storage()) for t in filters.packed]
    held += [weakref.ref(filters.follower._table.untyped_storage())] if check else []
    names(simulated_device)
    capturing(monkeypatch, True)
    model(x)
    assert (REFRESH in names(simulated_device)) is check
    capturing(monkeypatch, False)
    del filters
    resnet_fast.refresh(model)
    model(x)
    gc.collect()
    assert all(ref() is not None for ref in held)
    del model
    gc.collect()
    assert all(ref() is None for ref in held)


@torch.no_grad()
def test_a_capture_without_a_call_before_it_packs_within_the_graph(simulated_device, monkeypatch):
    """Nothing that a graph computes is there before its first replay: no later call may find it."""
    model, x = block(), torch.randn(1, 8, 4, 4)
    capturing(monkeypatch, True)
    model(x)
    gpu = model._chain.gpu
    assert (gpu._made, gpu._packed) == ({}, {})
    capturing(monkeypatch, False)
    before = model(x)
    assert len(gpu._made) == 1
    # Filters that a call has packed for another size are not in the graph of this one.
    capturing(monkeypatch, True)
    other = torch.randn(1, 8, 6, 6)
    change(model)
    y = model(other)
    assert len(gpu._made) == 1
    capturing(monkeypatch, False)
    assert torch.equal(y, packed_anew(model, other))
    assert not torch.equal(model(x), before)


@torch.no_grad()
def test_memory_stays_with_every_stream_that_writes_it(simulated_device, monkeypatch):
    """A check that waits on another stream than that of packing writes after the host has dropped the chain."""
    found = {"packs": [], "other": []}
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: found[stream].append(t.untyped_storage()))
    model, x = block(), torch.randn(1, 8, 4, 4)
    for current in ("packs", "other", "other", None, "other", "packs"):
        monkeypatch.setattr(freshness, "_stream", lambda t, stream=current: stream)
        model(x)
    (filters,) = model._chain.gpu._made.values()
    following = filters.follower
    written = [following._table, *filters.packed, *(f.fingerprints for f in following.filters)]
    for storages in found.values():
        assert {t.untyped_storage()._cdata for t in written} <= {storage._cdata for storage in storages}
        assert len(storages) == 2 + 2 * len(filters.packed)


@pytest.mark.parametrize("check", [True, False], ids=["compared", "not compared"])
@torch.no_grad()
def test_what_is_measured_is_not_kept(simulated_device, monkeypatch, check):
    """And what is captured twice is kept once."""
    monkeypatch.setattr(backends.cuda, "check_weights", check)
    model, x = block(), torch.randn(1, 8, 4, 4)
    model(x)
    gpu = model._chain.gpu
    kept = []
    monkeypatch.setattr("weakref.finalize", lambda *held: kept.append(held) or SimpleNamespace())
    capturing(monkeypatch, True)
    tuner = type("Tuner", (), {"choose_form": lambda self, name, forms, backend: [run() for run in forms.values()]})
    monkeypatch.setattr(tune, "tuner", lambda device: tuner())
    gpu._first_is_fastest(x, "chain", {"layers": lambda: gpu.run_layers(x)})
    assert kept == []
    for _ in range(2):
        gpu.run_layers(x)
        assert len(kept) == 1

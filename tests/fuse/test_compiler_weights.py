"""``torch.compile(backend="resnet_fast")`` where weights and statistics change, are shared, passed or computed. Eager
PyTorch says what is right."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers.compiler_support import BACKEND, block, compiled, counts, graphs
from helpers.feature_checks_modules import Frozen
from helpers.support import assert_same_model, randomize_
from torch import nn

import resnet_fast
from resnet_fast import backends, reference
from resnet_fast.fusion.pattern import ALONE


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    backends.fallbacks(clear=True)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_frozen_batch_norms(training, autocast):
    """Under autocast their float32 buffers make the result float32: unfused."""
    eager = reference.CifarResNet(1)
    for m in list(eager.modules()):
        for name, child in list(m.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(m, name, Frozen(child.num_features))
    eager.train(training)
    fast = compiled(eager, fullgraph=True)
    x = torch.randn(2, 3, 12, 12)
    with graphs() as seen:
        for factor in (1, 2):
            eager.bn1.weight.mul_(factor), fast.bn1.weight.mul_(factor)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                ours, theirs = fast(x), eager(x)
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            for y in (ours, theirs):
                y.float().square().sum().backward()
    assert counts(seen) == (9, 9, 4)
    for a, b in zip(fast.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)
    assert all("frozen batch norm under autocast" in reason for reason in backends.fallbacks())
    assert bool(backends.fallbacks()) == autocast


@torch.no_grad()
def test_packed_weights_follow():
    eager = block()
    fast = compiled(eager, fullgraph=True)
    x = torch.randn(2, 4, 9, 8)

    def change(action):
        before = fast(x)
        for m in (fast, eager):
            action(m)
        assert not torch.equal(fast(x), before)
        assert_same_model(fast, eager, x)

    change(lambda m: m.conv1.weight.mul_(2))
    change(lambda m: m.bn2.running_mean.add_(1))
    change(lambda m: m.load_state_dict(reference.BasicBlock(4, 4).state_dict() if m is fast else fast.state_dict()))
    change(lambda m: setattr(m.conv2, "weight", nn.Parameter(m.conv2.weight * 3)))
    change(lambda m: m.bn1.weight.data.mul_(2))
    change(lambda m: setattr(m, "bn1", randomize_(nn.BatchNorm2d(4, eps=0.5)).eval()))
    with graphs() as seen:
        fast.double(), eager.double()
        x = x.double()
        assert_same_model(fast, eager, x)
    assert counts(seen)[:2] == (2, 2)
    assert backends.fallbacks() == {}


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_splits_the_graph(process_group, monkeypatch):
    """At its buckets of gradients: each part of a stage becomes a chain of its own."""
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 20000)
    torch.manual_seed(0)
    net = randomize_(reference.CifarResNet(1)).train()
    eager = copy.deepcopy(net)
    parallel = nn.parallel.DistributedDataParallel(net, bucket_cap_mb=0.05)
    fast = torch.compile(parallel, backend=BACKEND)
    x = torch.randn(3, 3, 12, 12)
    with graphs() as seen:
        for m in (fast, eager):
            m(x).square().mean().backward()
    assert len(seen) > 1
    # A bucket ends between a block and its projection, and leaves the projection, a 1x1 convolution, alone.
    assert counts(seen)[:2] == (8, 9)
    assert [reason for g in seen for _, reason in g.reasons] == [ALONE]
    for (name, p), q in zip(net.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=name)
    for p, q in zip(net.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert backends.fallbacks() == {}


@torch.no_grad()
def test_refresh_packs_what_changed_unseen():
    eager = randomize_(nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16))).eval()
    fast = compiled(eager, fullgraph=True)
    x = torch.randn(1, 16, 6, 6)
    fast(x)
    for m in (fast, eager):
        m[0].weight.numpy().reshape(-1)[100:103] = 7  # outside of the sample that is compared
    resnet_fast.refresh(fast)
    assert_same_model(fast, eager, x)


def test_a_graph_serves_modules_of_a_class():
    """Blocks that are compiled one by one share a graph; each packs its own weights once."""
    blocks = [randomize_(reference.BasicBlock(4, 4), seed).eval() for seed in range(3)]
    exact = copy.deepcopy(blocks)
    for m in blocks:
        m.compile(backend=BACKEND)
    packed = []
    original = resnet_fast.chain.inference.Chain._pack

    def counting(self, *args):
        packed.append(self)
        return original(self, *args)

    x = torch.randn(2, 4, 9, 8)
    with graphs() as seen, torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet_fast.chain.inference.Chain, "_pack", counting)
        for _ in range(3):
            for fast, eager in zip(blocks, exact, strict=True):
                assert_same_model(fast, eager, x)
    assert len(seen) == 1
    assert len(packed) == 6


def test_what_is_packed_goes_with_the_compiled_graph():
    m = block()
    held = weakref.ref(m.conv1.weight)
    with torch.no_grad():
        torch.compile(m, backend=BACKEND)(torch.randn(1, 4, 5, 5))
    del m
    torch._dynamo.reset()
    gc.collect()
    assert held() is None


def test_weights_that_are_computed_are_no_layers():
    class Hyper(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.norm = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.BatchNorm2d(4)

        def forward(self, x):
            return F.relu(self.norm(F.conv2d(x, self.base * x.mean())))

    eager = randomize_(Hyper()).eval()
    fast = compiled(eager, fullgraph=True)
    with graphs() as seen:
        for _ in range(2):
            assert_same_model(fast, eager, torch.randn(2, 4, 7, 7))
    (graph,) = seen
    assert (graph.fused, graph.layers) == (0, 1)


def test_weights_that_a_caller_passes_are_no_layers():
    eager = block()
    fast = torch.compile(lambda p, x: torch.func.functional_call(eager, p, (x,)), backend=BACKEND)
    x = torch.randn(2, 4, 7, 7)
    for factor in (1, 2):
        p = {name: t.detach() * factor for name, t in eager.state_dict().items()}
        torch.testing.assert_close(fast(p, x), torch.func.functional_call(eager, p, (x,)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_a_batch_norm_that_is_called_twice(training, counted):
    """The second call updates the statistics that the first one left, though the first call's layer ends after it."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
            self.norm = nn.BatchNorm2d(4)
            if not counted:
                self.norm.num_batches_tracked = None

        def forward(self, x):
            y = self.norm(self.first(x))
            z = F.relu(self.norm(self.second(x)))
            return F.relu(y + x) * z

    eager = randomize_(Twice()).train(training)
    fast = compiled(eager, fullgraph=True)
    x = torch.randn(3, 4, 9, 9)
    with graphs() as seen:
        torch.testing.assert_close(fast(x), eager(x), rtol=1e-4, atol=1e-5)
    assert counts(seen) == ((0, 2, 0) if training else (2, 2, 2))
    for a, b in zip(fast.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_modes_and_gradients_compile_anew():
    eager = block()
    fast = compiled(eager, fullgraph=True)
    x = torch.randn(3, 4, 9, 8)
    for training in (False, True, False):
        fast.train(training), eager.train(training)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                y = fast(x)
            assert y.requires_grad == grad
            torch.testing.assert_close(y, eager(x), rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), eager(x), rtol=1e-4, atol=1e-4)
    assert backends.fallbacks() == {}

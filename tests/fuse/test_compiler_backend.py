"""``torch.compile(backend="resnet_fast")``: the chains that ``fuse`` finds; results, gradients and statistics by the
error rule."""

import copy
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import tomllib
import torch
from helpers.compiler_support import BACKEND, compiled, counts, graphs
from helpers.feature_support import counted
from helpers.fuse_checks import check_inference, check_training, prepared
from helpers.support import SHALLOW, assert_same_model, channels_last, shallow, twins
from test_fuse_networks import SIZES, network
from torch import nn

import resnet_fast
from resnet_fast import backends, reference
from resnet_fast.fusion.converted_module import ConvertedModule
from resnet_fast.fusion.execution_plan import ExecutionPlan


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    backends.fallbacks(clear=True)
    yield
    torch._dynamo.reset()


def test_the_backend_has_a_name():
    with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["entry-points"]["torch_dynamo_backends"]
    assert declared == {"resnet_fast": "resnet_fast.compiler:backend"}
    (installed,) = entry_points(group="torch_dynamo_backends", name="resnet_fast")
    assert installed.load() is resnet_fast.compiler.backend
    assert "resnet_fast" in torch._dynamo.list_backends()


def images(name, n=2):
    size = 32 if name == "CifarResNet" else 64
    return torch.randn(n, 3, size, size)


def eager(name):
    return prepared(shallow(reference, name))


def foreign(name):
    return {
        "preresnet10": lambda: network("preresnet", "preresnet10"),
        "seresnet10": lambda: network("seresnet", "seresnet10"),
        "resnext14": lambda: network("resnext", "resnext14_16x4d"),
        "densenet": lambda: network("densenet", "DenseNet", **SIZES["DenseNet"]),
        "diaresnet10": lambda: network("diaresnet", "diaresnet10"),
    }[name]()


FOREIGN = ("preresnet10", "seresnet10", "resnext14", "densenet", "diaresnet10")


def planned(fused, training):
    """The convolutions that ``fuse`` runs as chains in this mode, and the chains; the outer modules come first."""
    convolutions, chains = set(), 0
    for m in fused.modules():
        plan = m._resnet_fast.plans[training] if isinstance(m, ConvertedModule) else None
        if isinstance(plan, ExecutionPlan):
            inside = {
                part for segment in plan.segments for part in segment.layer_modules() if isinstance(part, nn.Conv2d)
            }
            chains += 0 if inside <= convolutions else len(plan.segments)
            convolutions |= inside
    return len(convolutions), chains


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", SHALLOW + FOREIGN)
def test_the_chains_of_fuse(name, training):
    net = (eager if name in SHALLOW else foreign)(name).train(training)
    fused = resnet_fast.fuse(net)
    report = resnet_fast.report(fused)
    with graphs() as seen, torch.no_grad():
        compiled(net, fullgraph=True)(images(name))
    convolutions, chains = planned(fused, training)
    assert counts(seen) == (convolutions, report.layers, chains)
    assert training or convolutions == report.fused
    assert sum(len(g.reasons) for g in seen) == report.layers - convolutions


@pytest.mark.parametrize("name", SHALLOW)
def test_results_of_a_network(name):
    """A batch beyond the small ones that run several stages as one chain, then a small batch."""
    net = eager(name)
    fast = compiled(net, fullgraph=True)
    for n in (5, 1):
        with backends.use("cpu"):
            assert_same_model(fast, net, images(name, n))
    assert backends.fallbacks() == {}


class Maps(nn.Module):
    """Up to the last feature map, which shows more than a few scores."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner.features(x)


@pytest.mark.parametrize("name", ["CifarResNet", "ResNet of basic blocks"])
def test_layouts_are_those_of_pytorch(name):
    net = Maps(eager(name))
    check_inference(net, compiled(net, fullgraph=True), images(name, 5))
    check_inference(net, compiled(net, fullgraph=True), images(name, 1))


@pytest.mark.parametrize("name", ["CifarResNet", "ResNet of bottlenecks"])
def test_a_training_step(name):
    net = Maps(eager(name))
    check_training(net, compiled(net, fullgraph=True), images(name))
    assert backends.fallbacks() == {}


@pytest.mark.parametrize("name", ["seresnet10", "preresnet10"])
def test_foreign_networks(name):
    net = foreign(name)
    fast = compiled(net, fullgraph=True)
    check_inference(net, fast, images(name))
    check_training(net, fast, images(name))


def assert_as_fused(net, x, run=lambda m, x: m(x), tolerance=0.0):
    """Two steps: results, gradients and statistics those of the module that ``fuse`` makes, bit for bit unless there is
    a ``tolerance``, in units of the largest value."""
    fast, fused = compiled(net, fullgraph=True), resnet_fast.fuse(net)
    with backends.use("cpu"):
        for _ in range(2):
            results = []
            for m in (fast, fused):
                m.zero_grad()
                y = run(m, x)
                y.float().square().mean().backward()
                results.append([y, *(p.grad for p in m.parameters()), *m.buffers()])
            for a, b in zip(*results, strict=True):
                assert (a is None) == (b is None)
                assert a is None or (a - b).abs().max() <= tolerance * b.abs().max()


def test_frozen_batch_norms_in_training():
    """Blocks whose batch norms are all frozen choose their algorithms as in eval mode, longer chains do not."""
    net = eager("CifarResNet").train()
    net.layer1.requires_grad_(False)
    for m in net.layer1.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    assert_as_fused(net, images("CifarResNet"), tolerance=1e-3)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": 0.5, "eps": 0.1}])
def test_kinds_of_batch_norms(options):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **options), nn.ReLU(), reference.BasicBlock(8, 8))
    assert_as_fused(net, torch.randn(3, 3, 9, 8))


def test_gradients_in_eval_mode():
    """In batches of more than four, stages run one by one, as after fuse."""
    net = eager("CifarResNet").to(memory_format=torch.channels_last)
    assert_as_fused(net, channels_last(images("CifarResNet", 5)))


def test_chains_in_a_row_see_what_changes():
    """From the second call on, one guard checks all consecutive chains."""
    net = eager("CifarResNet")
    fast, x = compiled(net, fullgraph=True), images("CifarResNet", 5)

    def change(m):
        m.layer2[0].conv2.weight.mul_(1.5)
        m.layer3[0].bn1.running_mean.add_(1)

    for kept in range(2):
        with torch.no_grad():
            ran = []
            for _ in range(3):
                with counted() as chains:
                    assert_same_model(fast, net, x)
                ran.append(len(chains))
            assert ran == [4, 4, 4], kept
            change(fast), change(net)
        assert fast(x.requires_grad_()).requires_grad
        x.requires_grad_(False)
    for context in (torch.autocast("cpu", torch.bfloat16), backends.use("eager")):
        with context, torch.no_grad():
            torch.testing.assert_close(fast(x), net(x), rtol=0.1, atol=0.1)
    assert backends.fallbacks() == dict.fromkeys(backends.fallbacks(), 1)
    assert len(backends.fallbacks()) == 4  # of use("eager") alone


def test_autocast_around_the_call():
    def run(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m(x)

    net = reference.BasicBlock(8, 16, 2).train()
    assert_as_fused(net, torch.randn(3, 8, 9, 8), run)
    assert run(net, torch.randn(3, 8, 9, 8)).dtype == torch.bfloat16


def test_own_networks_leave_their_chains_to_the_backend():
    fast, net = twins(resnet_fast.CifarResNet, reference.CifarResNet, 1)
    for model in (fast, resnet_fast.fuse(net)):
        with graphs() as seen, torch.no_grad():
            assert_same_model(torch.compile(model, backend=BACKEND, fullgraph=True), net, torch.randn(2, 3, 16, 16))
        assert counts(seen)[:2] == (9, 9)


def test_dynamic_sizes():
    net = eager("CifarResNet")
    fast = compiled(net, fullgraph=True, dynamic=True)
    with graphs() as seen, torch.no_grad():
        for shape in ((2, 3, 16, 12), (5, 3, 16, 12), (3, 3, 24, 20)):
            assert_same_model(fast, net, torch.randn(shape))
    assert counts(seen)[:2] == (9, 9)


def test_sizes_that_change():
    net = eager("CifarResNet").train()
    fast = compiled(net)
    exact = copy.deepcopy(net)
    with graphs() as seen:
        for n in (2, 3, 4, 5):
            x = torch.randn(n, 3, 16, 16)
            torch.testing.assert_close(fast(x), exact(x), rtol=1e-3, atol=1e-3)
    assert counts(seen)[:2] == (18, 18)  # the second graph is for all sizes of a batch


@pytest.mark.parametrize("rest", ["aot_eager", "inductor"])
def test_the_rest_compiled_by_another_backend(rest):
    """Pooling, a context and a classifier between and behind the chains."""
    net = Rests().train()
    fast, exact = compiled(net, fullgraph=True, options={"rest": rest}), copy.deepcopy(net)
    with graphs() as seen:
        for n in (2, 3, 5):
            x = torch.randn(n, 3, 16, 16)
            ours, theirs = fast(x), exact(x)
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
            for y in (ours, theirs):
                y.square().sum().backward()
    assert counts(seen) == (10, 10, 6)
    for a, b in zip(fast.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-2)


class Rests(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.first, self.second = reference.BasicBlock(8, 8), reference.BasicBlock(8, 8)
        self.classifier = nn.Linear(8, 4)

    def forward(self, x):
        y = self.first(self.pool(self.stem(x)).sigmoid())
        with torch.no_grad():
            scale = y.mean()
        y = self.second(y * scale)
        return self.classifier(y.flatten(2).mean(2))


def test_options_that_are_none():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with pytest.raises(Exception, match=r"options has 'rests', want .*rest"):
        compiled(net, options={"rests": "inductor"})(torch.randn(1, 3, 8, 8))

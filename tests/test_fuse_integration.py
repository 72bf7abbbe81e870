"""Fused networks in the hands of everything that people do with networks."""

import copy
import inspect
import io
import pickle
import socket
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from fuse_checks import prepared
from support import assert_error_rule, assert_same_model, eager_results
from test_freshness import FUSED_AFTERWARDS, UNFUSED_AFTERWARDS, check
from torch import nn

import resnet_fast
from resnet_fast import backends, reference
from resnet_fast.convert import FusedTraced

X = (2, 3, 16, 16)


def pair():
    """A network of stem, stages and classifier, and what fuse makes of it."""
    torch.manual_seed(0)
    net = prepared(reference.CifarResNet(1))
    return resnet_fast.fuse(net), net


def blocks_pair(**kwargs):
    net = prepared(reference.Block(16, 16, 1, **kwargs))
    return resnet_fast.fuse(net), net


def fused_names(model):
    return [name for name, m in model.named_modules() if isinstance(m, FusedTraced)]


def assert_fused(fused, net, x=None, method="__call__"):
    backends.fallbacks(clear=True)
    with backends.use("cpu"):
        return assert_same_model(fused, net, torch.randn(X) if x is None else x, method)


def test_nothing_but_classes_changes():
    net = prepared(reference.CifarResNet(1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    hook = net.layer2.register_forward_hook(lambda *_: None)
    before = [(n, id(m), m.training, {k: id(v) for k, v in vars(m).items()}) for n, m in net.named_modules()]
    tensors = [(n, id(t)) for n, t in (*net.named_parameters(), *net.named_buffers())]
    classes = [type(m) for m in net.modules()]
    assert resnet_fast.fuse(net, inplace=True) is net
    assert fused_names(net)[:3] == ["", "layer1", "layer1.0"]
    assert [(n, id(t)) for n, t in (*net.named_parameters(), *net.named_buffers())] == tensors
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in net.parameters()}
    assert all(isinstance(m, kind) for m, kind in zip(net.modules(), classes, strict=True))
    assert resnet_fast.unfuse(net, inplace=True) is net
    after = [(n, id(m), m.training, {k: id(v) for k, v in vars(m).items()}) for n, m in net.named_modules()]
    assert after == before
    assert [type(m) for m in net.modules()] == classes
    hook.remove()


def test_twice_is_once():
    fused, net = pair()
    names = fused_names(fused)
    assert resnet_fast.fuse(fused, inplace=True) is fused
    assert fused_names(fused) == names
    assert_fused(resnet_fast.fuse(fused), net)
    ours = resnet_fast.cifar_resnet20().eval()
    again = resnet_fast.fuse(ours)
    assert fused_names(again) == []
    report = resnet_fast.report(again)
    assert report.fused == report.layers == 21
    assert all(row.status == "fused" for row in report.rows)


def test_errors():
    with pytest.raises(TypeError, match=r"model is a str, want a torch\.nn\.Module"):
        resnet_fast.fuse("resnet18")
    for function in (resnet_fast.unfuse, resnet_fast.report):
        with pytest.raises(TypeError, match="model is a list"):
            function([])
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    for function in (resnet_fast.fuse, resnet_fast.report):
        with pytest.raises(TypeError, match="ScriptModule"):
            function(scripted)


@pytest.mark.filterwarnings("ignore")
def test_scripted_and_quantised_parts_stay():
    block = prepared(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    net = nn.Sequential(torch.jit.script(copy.deepcopy(block)), block).eval()
    fused = resnet_fast.fuse(net)
    assert fused_names(fused) == ["1"]
    x = torch.randn(2, 3, 5, 5)
    assert torch.allclose(fused(x), net(x), rtol=1e-4, atol=1e-5)

    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.ao.nn.quantized.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(x)

    quantised = nn.Sequential(Quantised(), copy.deepcopy(block))
    rows = {row.name: row for row in resnet_fast.report(resnet_fast.fuse(quantised, inplace=True)).rows}
    assert rows["0.conv"].status == "not fused"
    assert rows["0.conv"].detail == "not an nn.Conv2d"
    assert rows["1"].status == "fused"


def test_fused_on_the_meta_device_and_loaded_later():
    _, net = pair()
    with torch.device("meta"):
        fused = resnet_fast.fuse(reference.CifarResNet(1))
    assert fused(torch.randn(X, device="meta")).shape == (2, 10)
    assert backends.fallbacks()
    fused = fused.to_empty(device="cpu").eval()
    fused.load_state_dict(net.state_dict())
    assert_fused(fused, net)


def test_report_of_a_network_that_is_not_fused_says_what_could_be():
    _, net = pair()
    before = resnet_fast.report(net)
    assert {row.status for row in before.rows} == {"could be fused"}
    assert before.fused == 0
    assert fused_names(net) == []
    after = resnet_fast.report(resnet_fast.fuse(net))
    assert [row.name for row in after.rows] == [row.name for row in before.rows]
    assert str(after).splitlines()[-1] == f"{after.layers} of {after.layers} convolutions fused"


@pytest.mark.parametrize("copied", ["deepcopy", "copy", "pickle", "torch.save", "replica"])
@torch.no_grad()
def test_copies(copied):
    fused, net = pair()
    fused(torch.randn(X))  # packed
    if copied == "torch.save":
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    elif copied == "pickle":
        data = pickle.dumps(fused)
        weights = sum(t.nbytes for t in fused.state_dict().values())
        assert len(data) < 1.2 * weights + 500_000  # without packed filters
        other = pickle.loads(data)
    elif copied == "replica":  # as DataParallel makes them, for each module
        other = copy.deepcopy(fused)
        block = other.layer1
        other.layer1 = copy.copy(block)
        other.layer1.__dict__["_modules"] = {k: copy.deepcopy(m) for k, m in block._modules.items()}
    else:
        other = getattr(copy, copied)(fused)
    assert type(other) is type(fused)
    assert fused_names(other) == fused_names(fused)
    if copied != "copy":  # which shares the layers
        for m in (other, net):
            for p in m.parameters():
                p.mul_(1.1)
    assert_fused(other, net)
    chains = [m._resnet_fast.one._chain for m in other.modules() if isinstance(m, FusedTraced) and m._resnet_fast.one]
    assert any(chains)
    other(torch.randn(X))
    assert [
        m._resnet_fast.one._chain for m in other.modules() if isinstance(m, FusedTraced) and m._resnet_fast.one
    ] == chains
    if copied == "replica":
        assert not torch.equal(block[0].conv1.weight, other.layer1[0].conv1.weight)


OTHER_CODE = "another value of Block.downsample"  # a None when the code was traced
FALLS_BACK_HERE = {"projection added", "projection without norm", "stride"}


@pytest.mark.parametrize("name", FUSED_AFTERWARDS)
@torch.no_grad()
def test_changes_afterwards_are_seen(name):
    fused, net = blocks_pair()
    x = torch.randn(2, 16, 7, 7)
    fused.train().eval()
    check(fused, net, FUSED_AFTERWARDS[name], x)
    if name in FALLS_BACK_HERE:
        backends.fallbacks(clear=True)
        assert_same_model(fused, net, x)
        assert list(backends.fallbacks()) == [f"FusedBlock: {OTHER_CODE}"]
    else:
        assert_fused(fused, net, x)


@pytest.mark.parametrize("name", UNFUSED_AFTERWARDS)
@torch.no_grad()
def test_changes_that_end_the_fusion(name):
    fused, net = blocks_pair(dropout=0.5)
    x = torch.randn(2, 16, 7, 7)
    change, reason = UNFUSED_AFTERWARDS[name]
    after = check(fused, net, change, x)
    torch.manual_seed(0)
    assert torch.equal(after, net(x))
    reason = OTHER_CODE if name.startswith("projection") else reason
    assert any(k.startswith("FusedBlock: ") and reason in k for k in backends.fallbacks()), backends.fallbacks()


class Switch(nn.Module):
    """Code that depends on attributes."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.activation, self.scale, self.options = F.relu, 1.0, {"add": False}

    def forward(self, x):
        y = self.activation(self.bn(self.conv(x)))
        return y + x if self.options["add"] else y * self.scale if self.scale != 1 else y


@pytest.mark.parametrize(
    ("attribute", "value", "fused_after"),
    [("scale", 2.0, False), ("scale", 1.0, True), ("activation", torch.tanh, False), ("options", {"add": True}, False)],
)
@pytest.mark.parametrize("training", [False, True])
def test_attributes_that_the_code_depends_on(attribute, value, fused_after, training):
    net = prepared(Switch()).train(training)
    fused = resnet_fast.fuse(net)
    x = torch.randn(2, 4, 6, 6)
    fused(x)
    assert backends.fallbacks() == {}
    for m in (fused, net):
        setattr(m, attribute, value)
    assert torch.allclose(fused(x), net(x), rtol=1e-4, atol=1e-5)
    expected = {} if fused_after else {f"FusedSwitch: another value of Switch.{attribute}": 1}
    assert backends.fallbacks() == expected


def test_a_mode_in_which_the_code_does_something_else():
    class Depth(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = reference.BasicBlock(4, 4)

        def forward(self, x):
            y = self.block(x)
            return y * torch.bernoulli(torch.full((1,), 0.5)) if self.training else y

    net = prepared(Depth())
    fused = resnet_fast.fuse(net)
    x = torch.randn(2, 4, 6, 6)
    assert_fused(fused, net, x)
    for m in (fused, net):
        m.train()
    torch.manual_seed(1)
    y = fused(x)
    torch.manual_seed(1)
    assert torch.allclose(y, net(x), rtol=1e-4, atol=1e-5)
    assert [k.partition(":")[0] for k in backends.fallbacks()] == ["FusedDepth"]  # the block inside is fused


def test_other_arguments():
    class Scaled(reference.BasicBlock):
        def forward(self, x, factor=None):
            y = super().forward(x)
            return y if factor is None else y * factor

    net = prepared(Scaled(4, 4))
    fused, x = resnet_fast.fuse(net), torch.randn(2, 4, 6, 6)
    for args, kwargs, reasons in [
        ((), {"x": x}, {}),
        ((x, None), {}, {}),
        ((x, 2.0), {}, {"FusedScaled: called with other arguments than it was traced with": 1}),
    ]:
        assert torch.allclose(fused(*args, **kwargs), net(*args, **kwargs), rtol=1e-4, atol=1e-5)
        assert backends.fallbacks(clear=True) == reasons
    with pytest.raises(TypeError):
        fused()
    assert list(inspect.signature(fused.forward).parameters) == ["x", "factor"]


def test_hooks():
    """On a block: it stays fused, its stage does not. Inside of a block: the block falls back. Without: all fused."""
    fused, net = pair()
    x, seen = torch.randn(X), {}

    def keep(name):
        return lambda m, args, y: seen.__setitem__(name, y)

    handles = [m.layer2[0].register_forward_hook(keep(i)) for i, m in enumerate((fused, net))]
    with torch.no_grad():
        fused(x), net(x)
        assert torch.allclose(seen[0], seen[1], rtol=1e-4, atol=1e-5)
        assert backends.fallbacks(clear=True) == {"FusedSequential: a hook on a FusedBasicBlock": 1}
        handles.append(fused.layer1[0].conv2.register_forward_hook(keep("conv")))
        fused(x)
        assert "conv" in seen
        assert "FusedBasicBlock: a hook on a Conv2d" in backends.fallbacks()
    for handle in handles:
        handle.remove()
    assert_fused(fused, net)
    hooked = copy.deepcopy(net)
    hooked.layer1[0].conv2.register_forward_hook(keep("later"))
    rows = {row.name: row.detail for row in resnet_fast.report(resnet_fast.fuse(hooked, inplace=True)).rows}
    assert rows["layer1.0.conv2"] == "a hook on a Conv2d"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_other_dtypes(dtype):
    fused, net = (m.to(dtype) for m in pair())
    x = torch.randn(X).to(dtype)
    if dtype == torch.float16:
        assert torch.equal(fused(x), net(x))
        assert all("no kernel for torch.float16" in k for k in backends.fallbacks())
        fused, net, x = fused.float(), net.float(), x.float()
    exact, results = eager_results(net, x, "features")
    with backends.use("cpu"):
        assert_error_rule(fused.features(x), exact, results, factor=3)


@torch.no_grad()
def test_memory_formats():
    fused, net = pair()
    x = torch.randn(X)
    assert fused.layer1(torch.randn(2, 16, 8, 8)).is_contiguous()
    for m in (fused, net):
        m.to(memory_format=torch.channels_last)
    assert_fused(fused, net, x)
    assert_fused(fused, net, x.contiguous(memory_format=torch.channels_last))
    assert fused.layer1(torch.randn(2, 16, 8, 8)).is_contiguous(memory_format=torch.channels_last)
    grey = resnet_fast.fuse(prepared(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())))
    assert grey(torch.randn(2, 1, 8, 8)).view(2, -1).shape == (2, 144)


@pytest.mark.parametrize("first", ["fuse", "convert"])
def test_sync_batch_norm(first):
    net = prepared(reference.CifarResNet(1))
    if first == "fuse":
        fused = nn.SyncBatchNorm.convert_sync_batchnorm(resnet_fast.fuse(net))
    else:
        fused = resnet_fast.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(net)))
        assert resnet_fast.report(fused).fused == 0
    x = torch.randn(X)
    assert torch.allclose(fused(x), net(x), rtol=1e-4, atol=1e-5)
    assert list(fused.state_dict()) == list(net.state_dict())
    if first == "fuse":
        assert any("SyncBatchNorm where a BatchNorm2d was" in k for k in backends.fallbacks())


def test_a_frozen_backbone():
    fused, net = pair()
    for m in (fused, net):
        m.train()
        m.requires_grad_(False)
        m.fc.requires_grad_(True)
        m.layer3.requires_grad_(True)
        for part in (m.layer1, m.layer2):
            part.eval()
    x = torch.randn(X)
    with backends.use("cpu"):
        fused(x).square().mean().backward()
    net(x).square().mean().backward()
    for (name, p), q in zip(fused.named_parameters(), net.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) == (not name.startswith(("fc", "layer3"))), name
        assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-6), name
    for (name, p), q in zip(fused.named_buffers(), net.buffers(), strict=True):
        assert torch.allclose(p.double(), q.double(), rtol=1e-4), name


@pytest.fixture
def process_group():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("first", ["fuse", "wrap"])
def test_distributed_data_parallel(first, process_group):
    """Around a fused network, or fused afterwards with what is inside."""
    parallel = nn.parallel.DistributedDataParallel
    net = prepared(reference.CifarResNet(1)).train()
    x = torch.randn(X)
    expected = copy.deepcopy(net)
    expected(x).square().mean().backward()
    wrapped = parallel(resnet_fast.fuse(net)) if first == "fuse" else resnet_fast.fuse(parallel(net), inplace=True)
    assert type(wrapped) is parallel
    assert fused_names(wrapped.module)
    with backends.use("cpu"):
        wrapped(x).square().mean().backward()
    for p, q in zip(wrapped.module.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-6)


def operators(graph_module):
    return [str(n.target) for n in graph_module.graph.nodes if "residual_stage" in str(n.target)]


@torch.no_grad()
def test_compile():
    torch._dynamo.reset()
    fused, net = pair()
    seen = []

    def backend(graph_module, inputs):
        seen.extend(operators(graph_module))
        return graph_module

    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    assert_same_model(compiled, net, torch.randn(X))
    assert len(seen) == 4
    torch._dynamo.reset()


def test_compiled_gradients():
    torch._dynamo.reset()
    fused, net = pair()
    x = torch.randn(X)
    torch.compile(fused, fullgraph=True, backend="aot_eager")(x).square().mean().backward()
    net(x).square().mean().backward()
    for p, q in zip(fused.parameters(), net.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


@torch.no_grad()
def test_export():
    fused, net = pair()
    x = torch.randn(X)
    program = torch.export.export(fused, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    assert len(operators(program.graph_module)) == 4
    assert_same_model(program.module(), net, torch.randn(5, 3, 16, 16))


@torch.no_grad()
def test_symbolic_trace_and_jit_trace_see_the_original_code():
    fused, net = pair()
    x = torch.randn(X)
    graph = torch.fx.symbolic_trace(net)
    ours = torch.fx.symbolic_trace(resnet_fast.unfuse(fused))
    assert len(ours.graph.nodes) == len(graph.graph.nodes)
    assert torch.allclose(torch.jit.trace(fused, x)(x), net(x), rtol=1e-4, atol=1e-5)


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint_sequential

    fused, net = pair()
    x = torch.randn(2, 16, 8, 8)
    results = []
    for m in (fused, net):
        m.train()
        own = x.clone().requires_grad_()
        y = checkpoint_sequential([m.layer1, m.layer2, m.layer3], 3, own, use_reentrant=False)
        y.square().mean().backward()
        results.append([own.grad, *(p.grad for p in m.layer2.parameters())])
    for p, q in zip(*results, strict=True):
        assert torch.allclose(p, q, rtol=1e-3, atol=1e-6)


def test_autocast():
    fused, net = pair()
    x = torch.randn(X)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), backends.use("cpu"):
        y = fused.features(x)
        expected = net.features(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert (y.float() - expected.float()).norm() < 0.05 * expected.float().norm()


@torch.no_grad()
def test_public_cifar_checkpoints():
    """Keys as in widely used CIFAR networks: conv1 bn1 layer1.0.conv1 ... linear, and with DataParallel's prefix."""

    class Published(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
            widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
            self.layer1, self.layer2, self.layer3 = (
                nn.Sequential(*(PublishedBlock(a if i == 0 else b, b, s if i == 0 else 1) for i in range(3)))
                for a, b, s in widths
            )
            self.linear = nn.Linear(64, 10)

        def forward(self, x):
            out = F.relu(self.bn1(self.conv1(x)))
            out = self.layer3(self.layer2(self.layer1(out)))
            return self.linear(F.avg_pool2d(out, out.size()[3]).view(out.size(0), -1))

    class PublishedBlock(nn.Module):
        """With zeros in the place of channels that the shortcut lacks."""

        def __init__(self, inner, out, stride):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(inner, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
            self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
            self.stride, self.pad = stride, (out - inner) // 2

        def forward(self, x):
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            if self.pad:
                x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
            return F.relu(y + x)

    net = prepared(Published())
    checkpoint = {"state_dict": nn.DataParallel(net).state_dict()}
    fused = resnet_fast.fuse(Published().eval())
    fused.load_state_dict({k.removeprefix("module."): v for k, v in checkpoint["state_dict"].items()}, strict=True)
    assert_fused(fused, net)
    report = resnet_fast.report(fused)
    assert report.fused == report.layers == 19
    assert any("pad" in row.detail or "add" in row.detail for row in report.rows if row.name == "layer2.0")


FUSES_RESNET50 = """
import re, time
from pytorchcv.models.resnet import resnet50
import resnet_fast, sys
early = [m for m in sys.modules if m in ("resnet_fast.survey", "resnet_fast.tracing")]  # import does not load them
net = resnet50()
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before, begin = peak(), time.process_time()
fused = resnet_fast.fuse(net)
assert not early
print(time.process_time() - begin, (peak() - before) / sum(t.nbytes for t in net.state_dict().values()))
"""


def test_resnet50_takes_little_time_and_memory():
    """In a process of its own, where the peak of memory is not another test's."""
    result = subprocess.run([sys.executable, "-c", FUSES_RESNET50], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    seconds, memory = map(float, result.stdout.split())
    assert seconds < 3
    assert 0.9 < memory < 1.2  # in models: the copy

"""What ``fuse`` changes in a network and what not; fused networks survive copies, pickles and checkpoints."""

import copy
import io
import pickle
import struct
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers.fuse_checks import prepared
from helpers.fuse_support import X, assert_fused, fused_names, pair
from helpers.support import assert_same_model
from torch import nn

import resnet_fast
from resnet_fast import backends, reference
from resnet_fast.fusion.converted_module import ConvertedModule


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
    chains = [
        m._resnet_fast.one._chain for m in other.modules() if isinstance(m, ConvertedModule) and m._resnet_fast.one
    ]
    assert any(chains)
    other(torch.randn(X))
    assert [
        m._resnet_fast.one._chain for m in other.modules() if isinstance(m, ConvertedModule) and m._resnet_fast.one
    ] == chains
    if copied == "replica":
        assert not torch.equal(block[0].conv1.weight, other.layer1[0].conv1.weight)


@torch.no_grad()
def test_pickles_of_earlier_versions():
    """Their classes and attributes have other names."""
    earlier = {
        "fusion.convert\nFusionState\n": "convert\nFusion\n",
        "fusion.converted_module\n_rebuild\n": "convert\n_again\n",
        "fusion.module_guard\nModuleGuard\n": "plan\nOpened\n",
        "fusion.execution_plan\nExecutionPlan\n": "plan\nPlan\n",
        "fusion.execution_plan\n": "plan\n",
    }
    attributes = {"guards": "opened", "noops": "through", "slots": "count"}
    fused, net = pair()
    data = pickle.dumps(fused, protocol=2)  # which has all names as text
    texts = {f"cresnet_fast.{now}".encode(): f"cresnet_fast.{then}".encode() for now, then in earlier.items()}
    texts |= {_pickled(now): _pickled(then) for now, then in attributes.items()}
    for now, then in texts.items():
        assert now in data, now
        data = data.replace(now, then)
    assert b"resnet_fast.fusion" not in data
    other = pickle.loads(data)
    assert fused_names(other) == fused_names(fused)
    assert_fused(other, net)


@torch.no_grad()
def test_a_slice_of_a_fused_sequential():
    """Its class makes it, so it has no plan until it is fused itself."""
    net = prepared(nn.Sequential(*(reference.BasicBlock(3, 3) for _ in range(3))))
    fused, x = resnet_fast.fuse(net), torch.randn(X)
    part = fused[:2]
    assert type(part) is type(fused)
    assert fused_names(part) == ["", "0", "1"]
    assert_same_model(part, net[:2], x)
    assert backends.fallbacks(clear=True) == {"FusedSequential: made since by its class: fuse it": 1}
    assert_same_model(part.train().eval(), net[:2], x)
    assert [(row.status, row.layers) for row in resnet_fast.report(part).rows] == [("could be fused", 4)]
    backends.fallbacks(clear=True)
    assert_fused(resnet_fast.fuse(part), net[:2], x)
    assert backends.fallbacks() == {}


def _pickled(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


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
        """Zeros stand for channels that the shortcut lacks."""

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
early = [m for m in sys.modules if m in ("resnet_fast.fusion.partition", "resnet_fast.fusion.trace")]
net = resnet50()
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before, begin = peak(), time.process_time()
fused = resnet_fast.fuse(net)
assert not early
print(time.process_time() - begin, (peak() - before) / sum(t.nbytes for t in net.state_dict().values()))
"""


def test_resnet50_takes_little_time_and_memory():
    """In a process of its own: the peak of memory must not be another test's."""
    result = subprocess.run([sys.executable, "-c", FUSES_RESNET50], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    seconds, memory = map(float, result.stdout.split())
    assert seconds < 3
    assert 0.9 < memory < 1.2  # in models: the copy

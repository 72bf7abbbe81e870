"""Tracers and exports of our networks and of those that ``fuse`` made: PyTorch's own operators, the same results; and
the arithmetic that PyTorch's counter sees in our operators."""

import copy
import io
import logging
import subprocess
import sys

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from helpers.fuse_checks import prepared
from helpers.support import shallow
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.utils.flop_counter import FlopCounterMode

import resnet_fast
from resnet_fast import backends, models, ops, reference

NETWORKS = ("CifarResNet", "ResNet of basic blocks", "ResNet32")


@pytest.fixture(params=[f"{kind} {name}" for name in NETWORKS for kind in ("own", "fused")])
def networks(request):
    """A network that runs fused, its eager twin, images."""
    kind, name = request.param.split(" ", 1)
    eager = prepared(shallow(reference, name))
    if kind == "fused":
        fast = resnet_fast.fuse(eager)
    else:
        fast = shallow(models, name).eval()
        fast.load_state_dict(eager.state_dict())
    size = 16 if name == "CifarResNet" else 64
    return fast, eager, torch.randn(2, 3, size, size)


def targets(graph):
    return {str(n.target) for n in graph.nodes if n.op == "call_function"}


@torch.no_grad()
def test_symbolic_trace(networks):
    fast, eager, x = networks
    traced = torch.fx.symbolic_trace(fast)
    assert not any("resnet_fast" in target for target in targets(traced.graph))
    assert torch.equal(traced(x), eager(x))
    fast.train(), eager.train()
    assert torch.equal(torch.fx.symbolic_trace(fast)(x), eager(x))


@torch.no_grad()
def test_quantisation_of_a_traced_graph(networks):
    """As of the twin: what observers see, and after conversion the integers."""
    fast, eager, x = networks
    ours, theirs = (prepare_fx(copy.deepcopy(m), get_default_qconfig_mapping(), (x,)) for m in (fast, eager))
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(convert_fx(ours)(x), convert_fx(theirs)(x))


@torch.no_grad()
def test_script(networks):
    fast, eager, x = networks
    classes = [type(m) for m in fast.modules()]
    scripted = torch.jit.script(fast)
    assert torch.equal(scripted(x), eager(x))
    if type(fast) is not type(eager):  # PyTorch gives other modules the twins as children
        assert [type(m) for m in fast.modules()] == classes
    stream = io.BytesIO()
    torch.jit.save(scripted, stream)
    stream.seek(0)
    assert torch.equal(torch.jit.load(stream)(x), eager(x))
    # The parameters are shared.
    fast.conv1.weight.mul_(2), eager.conv1.weight.mul_(2)
    assert torch.equal(scripted(x), eager(x))


@torch.no_grad()
def test_script_of_a_class_derived_from_ours_says_that_it_cannot():
    class Derived(resnet_fast.CifarResNet):
        def forward(self, x):
            return super().forward(x) * 2

    with pytest.raises(Exception, match=r"super|Compiled functions|variable number"):
        torch.jit.script(Derived(1).eval())


@torch.no_grad()
def test_trace(networks):
    fast, eager, x = networks
    assert torch.equal(torch.jit.trace(fast, x)(x), eager(x))


LOAD = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
x, y = torch.load(sys.argv[2])
assert torch.equal(program(x), y), "another result"
assert "resnet_fast" not in sys.modules, "the package was imported"
"""


@torch.no_grad()
def test_export(networks, tmp_path, request):
    """A program of PyTorch's operators alone, before and after its decomposition, as exporters to ONNX take it."""
    fast, eager, x = networks
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(fast, (x,), dynamic_shapes=({0: batch},))
    for p in (program, program.run_decompositions()):
        assert all(target.startswith(("aten.", "<built-in", "torch.sym")) for target in targets(p.graph))
    more = torch.cat((x, x[:1]))
    assert torch.equal(program.module()(more), eager(more))
    if "basic blocks" in request.node.name:
        torch.export.save(program, tmp_path / "program.pt2")
        torch.save((more, eager(more)), tmp_path / "images.pt")
        command = [sys.executable, "-c", LOAD, str(tmp_path / "program.pt2"), str(tmp_path / "images.pt")]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("kind", ["own", "fused"])
def test_onnx(kind, dynamo, tmp_path):
    """Operators of ONNX alone, for batches of any size; ONNX Runtime and PyTorch agree but for rounding."""
    eager = prepared(reference.CifarResNet(1))
    fast = resnet_fast.fuse(eager) if kind == "fused" else resnet_fast.CifarResNet(1).eval()
    fast.load_state_dict(eager.state_dict())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not installed
    path, x, more = tmp_path / "network.onnx", torch.randn(2, 3, 8, 8), torch.randn(5, 3, 8, 8)
    sizes = {"dynamic_shapes": ({0: torch.export.Dim("n")},)} if dynamo else {"dynamic_axes": {"x": {0: "n"}}}
    torch.onnx.export(fast, (x,), path, dynamo=dynamo, input_names=["x"], verbose=False, **sizes)
    assert {n.domain for n in onnx.load(path).graph.node} == {""}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for images in (x, more):
        (y,) = session.run(None, {"x": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), eager(images), rtol=1e-4, atol=1e-5)


def test_export_of_a_network_in_training_mode():
    fast, eager = resnet_fast.CifarResNet(1).train(), reference.CifarResNet(1).train()
    eager.load_state_dict(fast.state_dict())
    x = torch.randn(3, 3, 8, 8)
    program = torch.export.export(fast, (x,)).module()
    assert torch.equal(program(x), eager(x))
    for (name, a), b in zip(program.named_buffers(), eager.buffers(), strict=True):
        assert torch.equal(a, b), name


# What PyTorch's counter sees


def counted(call, *args):
    with FlopCounterMode(display=False) as mode:
        call(*args)
    return mode.get_total_flops()


def test_operators_count_as_their_convolutions():
    x, weight, residual = torch.randn(2, 3, 9, 8), torch.randn(5, 3, 3, 2), torch.randn(2, 5, 4, 5)
    expected = counted(lambda: F.conv2d(x, weight, None, 2, (0, 1)))
    assert expected == 2 * residual.numel() * weight[0].numel()
    for op, images in ((ops.conv_bn, (x,)), (ops.conv_bn_relu, (x,)), (ops.conv_bn_add_relu, (x, residual))):
        assert counted(lambda op=op, images=images: op(*images, weight, stride=2, padding=(0, 1))) == expected


@pytest.mark.parametrize("imports", ["torch.utils.flop_counter, resnet_fast", "resnet_fast, torch.utils.flop_counter"])
def test_the_counter_is_told_whoever_is_imported_first(imports):
    code = f"import {imports}; from torch.utils.flop_counter import flop_registry as known; import torch; "
    code += "assert torch.ops.resnet_fast.conv_bn in known and torch.ops.aten.mm in known"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_exported_operators_count_as_their_convolutions():
    fast, eager = resnet_fast.CifarResNet(1).eval(), reference.CifarResNet(1).eval()
    x = torch.randn(2, 3, 9, 8)
    with backends.use("cpu"):
        program = torch.export.export(fast, (x,))
    assert any("conv_chain" in target for target in targets(program.graph))
    assert counted(program.module(), x) == counted(eager, x) > 0


@pytest.mark.parametrize("frozen", [False, True])
def test_training_steps_count_as_their_convolutions(frozen):
    """The graph of a compiler: one operator a stage, forward and backward."""
    torch._dynamo.reset()
    fast, eager = (kind(1).train() for kind in (resnet_fast.CifarResNet, reference.CifarResNet))
    for m in (fast, eager):
        m.conv1.requires_grad_(not frozen), m.bn1.requires_grad_(not frozen)
        m.layer1.requires_grad_(not frozen)
    x, found = torch.randn(2, 3, 9, 8), []

    def backend(graph_module, inputs):
        assert any("train_chain" in target for target in targets(graph_module.graph))

        def call(*args):
            found.append((graph_module, args))
            return graph_module(*args)

        return call

    torch.compile(fast, backend=backend)(x)
    ((graph_module, args),) = found
    step = counted(lambda: graph_module(*args)[0].sum().backward())
    assert step == counted(lambda: eager(x).sum().backward()) > 0


def test_plain_pooling_is_scripted():
    pool = resnet_fast.chain.pooling.MaxPool2d(3, 2, 1)
    x = torch.randn(1, 2, 7, 7)
    assert torch.equal(torch.jit.script(nn.Sequential(pool))(x), F.max_pool2d(x, 3, 2, 1))

"""Whole networks on the GPU path: the same modules on CPU tensors, every kernel executed by the simulator."""

import copy

import pytest
import torch
from helpers.support import assert_error_rule
from ptxsim.device import simulated

import resnet_fast
from resnet_fast import backends, reference
from resnet_fast.backends import launch


@pytest.fixture(autouse=True)
def exact_float32():
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def used_statistics(model):
    """Running statistics as after some training: fresh ones leave batch norm out."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def last_feature_map(model, x):
    return model.features(x)


def check(name, shape, dtype, launches, **options):
    model = used_statistics(getattr(resnet_fast, name)(**options))
    twin = getattr(reference, name)(**options).eval()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(shape)
    with torch.no_grad():
        exact = copy.deepcopy(twin).double().features(x.double())
        low = copy.deepcopy(twin).to(dtype)
        eager = [
            low.features(x.to(dtype).contiguous(memory_format=f))
            for f in (torch.contiguous_format, torch.channels_last)
        ]
        out = model.to(dtype).features(x.to(dtype))
    assert_error_rule(out, exact, eager, name)
    assert backends.fallbacks() == {}
    return launches


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cifar_resnet32(simulated_device, dtype):
    check("cifar_resnet32", (2, 3, 16, 16), dtype, simulated_device.launches)
    convolutions = [n for n, _ in simulated_device.launches if n == "_conv_bn_relu_fwd_kernel"]
    assert len(convolutions) == 33  # 31 and two projections


def test_resnet32(simulated_device):
    check("ResNet32", (1, 3, 64, 64), torch.float16, simulated_device.launches, image_size=64)
    convolutions = [n for n, _ in simulated_device.launches if n == "_conv_bn_relu_fwd_kernel"]
    assert len(convolutions) == 1 + 2 * 16 + 3  # the stem, blocks, projections


def test_bottleneck(simulated_device):
    block = used_statistics(resnet_fast.blocks.Bottleneck(32, 16, 2))
    twin = reference.Bottleneck(32, 16, 2).eval()
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 32, 9, 7)
    with torch.no_grad():
        exact = copy.deepcopy(twin).double()(x.double())
        assert_error_rule(block(x), exact, [twin(x)])
    assert backends.fallbacks() == {}


def test_autocast(simulated_device):
    """float32 weights under autocast: packed in autocast's dtype, and anew when it is left."""
    block = used_statistics(resnet_fast.blocks.BasicBlock(16, 16))
    twin = reference.BasicBlock(16, 16).eval()
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 16, 6, 5)
    with torch.no_grad():
        exact = copy.deepcopy(twin).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            out, eager = block(x), twin(x)
        assert out.dtype == torch.bfloat16
        assert_error_rule(out, exact, [eager])
        assert_error_rule(block(x), exact, [twin(x)])
    assert backends.fallbacks() == {}


def test_gradients_of_a_frozen_network(simulated_device):
    """Eval mode with gradients: fused forward, PyTorch's own operators behind."""
    block = used_statistics(resnet_fast.blocks.BasicBlock(16, 16))
    twin = reference.BasicBlock(16, 16).eval()
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 16, 6, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(block(x).square().sum(), x)
    assert simulated_device.launches
    exact_twin, exact_x = copy.deepcopy(twin).double(), x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(exact_twin(exact_x).square().sum(), exact_x)
    (eager,) = torch.autograd.grad(twin(x).square().sum(), x)
    assert_error_rule(grad, exact, [eager])


def test_weights_stay_fresh(simulated_device):
    block = used_statistics(resnet_fast.blocks.BasicBlock(16, 16))
    x = torch.randn(1, 16, 4, 4)
    with torch.no_grad():
        before = block(x)
        block.conv1.weight.mul_(2)
        after = block(x)
        twin = reference.BasicBlock(16, 16).eval()
        twin.load_state_dict(block.state_dict())
        assert_error_rule(after, copy.deepcopy(twin).double()(x.double()), [twin(x)])
    assert not torch.equal(before, after)


def test_named_backends(simulated_device):
    block = used_statistics(resnet_fast.blocks.BasicBlock(16, 16))
    x = torch.randn(1, 16, 4, 4)
    assert backends.status()["triton"] == "loaded"
    with torch.no_grad():
        with backends.use("triton"):
            block(x)
        with backends.use("cpu"), pytest.raises(RuntimeError, match=r"use\('cpu'\): BasicBlock cannot run fused"):
            block(x)
        with backends.use("triton"), pytest.raises(RuntimeError, match=r"no kernel for torch\.float64"):
            block.double()(x.double())


def test_compiles_into_one_graph():
    """The compiler sees the GPU path whole, and expects of each operator the shape that the operator gives."""
    block = used_statistics(resnet_fast.blocks.BasicBlock(16, 32, 2)).requires_grad_(False)
    x = torch.randn(2, 16, 7, 6)
    eager = reference.BasicBlock.forward(block, x)
    graphs = []

    def keep(graph, examples):
        graphs.append((graph, examples))
        return lambda *inputs: (eager,)

    with torch.no_grad():
        with launch.use_device(object()):  # nothing is launched: the compiler calls operators with shapes alone
            torch.compile(block, fullgraph=True, backend=keep)(x)
        ((graph, inputs),) = graphs
        shapes = {n.name: n.meta["example_value"].shape for n in graph.graph.nodes if "pack_conv_bn" in n.name}
        assert len(shapes) == 3
        with simulated() as device:
            (y,) = graph(*inputs)
            for conv in (block.conv1, block.conv2, block.downsample[0]):
                packed = torch.ops.resnet_fast.pack_conv_bn(conv.weight, None, None, None, None, None, 0.0)
                assert packed.shape in shapes.values()
        assert [name for name, _ in device.launches].count("_conv_bn_relu_fwd_kernel") == 3
        assert_error_rule(y, copy.deepcopy(block).double()(x.double()), [eager])

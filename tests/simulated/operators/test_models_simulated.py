"""Whole networks on the GPU path: the same modules on CPU tensors, every kernel executed by the simulator."""

import copy

import pytest
import torch
from helpers.cuda_support import cuda_device
from helpers.support import EAGER_LAYOUTS, assert_error_rule, computing, randomize_, twins
from ptxsim.device import simulated

import resnet_fast
from resnet_fast import backends, blocks, reference
from resnet_fast.backends import launch

pytestmark = pytest.mark.usefixtures("exact_float32")


def check(device, make, shape, dtype, counts):
    """The last feature map by the error rule; as many launches of each kernel."""
    fast, eager = make(resnet_fast.models), make(reference)
    eager.load_state_dict(randomize_(fast).eval().state_dict())
    eager.eval()
    x = torch.randn(shape)
    with torch.no_grad():
        exact = copy.deepcopy(eager).double().features(x.double())
        low = eager.to(dtype)
        results = [low.features(x.to(dtype).contiguous(memory_format=f)) for f in EAGER_LAYOUTS]
        out = fast.to(dtype).features(x.to(dtype))
    assert_error_rule(out, exact, results)
    assert backends.fallbacks() == {}
    for name, count in counts.items():
        assert len([n for n, _ in device.launches if n.startswith(name)]) == count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cifar_resnet20(device, kernel, dtype):
    check(device, lambda m: m.cifar_resnet20(), (2, 3, 16, 16), dtype, {kernel: 1 + 2 * 9 + 2})


def test_resnet(device, backend, kernel):
    """Stem, blocks of 64 to 512 channels, projections; the stem in CUDA C++ pools, too."""
    pooled = backend == "cuda"
    counts = {kernel: (not pooled) + 2 * 4 + 3, "conv_bn_relu_pool_fwd_kernel<": pooled}
    check(device, lambda m: m.ResNet([1, 1, 1, 1], 7), (1, 3, 64, 64), torch.float16, counts)


def test_bottleneck(device):
    fast, eager = twins(blocks.Bottleneck, reference.Bottleneck, 32, 16, 2)
    x = torch.randn(2, 32, 9, 7)
    with torch.no_grad():
        assert_error_rule(fast(x), copy.deepcopy(eager).double()(x.double()), [eager(x)])
    assert backends.fallbacks() == {}


def basic_block():
    return twins(blocks.BasicBlock, reference.BasicBlock, 16, 16)


def test_autocast(device):
    """float32 weights under autocast: packed in autocast's dtype, and anew when it is left."""
    fast, eager = basic_block()
    x = torch.randn(2, 16, 6, 5)
    with torch.no_grad():
        exact = copy.deepcopy(eager).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            out, low = fast(x), eager(x)
        assert out.dtype == torch.bfloat16
        assert_error_rule(out, exact, [low])
        assert_error_rule(fast(x), exact, [eager(x)])
    assert backends.fallbacks() == {}


def test_gradients_of_a_frozen_network(device):
    """Eval mode with gradients: fused forward, PyTorch's own operators behind."""
    fast, eager = basic_block()
    x = torch.randn(2, 16, 6, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(fast(x).square().sum(), x)
    assert device.launches
    exact_x = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(copy.deepcopy(eager).double()(exact_x).square().sum(), exact_x)
    (low,) = torch.autograd.grad(eager(x).square().sum(), x)
    assert_error_rule(grad, exact, [low])


def test_weights_stay_fresh(device):
    fast, eager = basic_block()
    x = torch.randn(1, 16, 4, 4)
    with torch.no_grad():
        before = fast(x)
        for m in (fast, eager):
            m.conv1.weight.mul_(2)
        after = fast(x)
        assert_error_rule(after, copy.deepcopy(eager).double()(x.double()), [eager(x)])
    assert not torch.equal(before, after)


@torch.no_grad()
def test_named_backends(device, backend, kernel):
    """Either kind of kernels alone, by name; another name is refused where kernels of GPUs are what there is."""
    fast, _ = basic_block()
    x = torch.randn(1, 16, 4, 4)
    assert backends.status()[backend] == backends.status()["triton"] == "loaded"
    fast(x)
    with backends.use("triton"):
        fast(x)
    assert [name.startswith(kernel) for name, _ in computing(device)] == [True] * 2 + [backend == "triton"] * 2
    with backends.use("cpu"), pytest.raises(RuntimeError, match=r"use\('cpu'\): BasicBlock cannot run fused"):
        fast(x)
    with backends.use(backend), pytest.raises(RuntimeError, match=r"no kernel for torch\.float64"):
        fast.double()(x.double())


def test_compiles_into_one_graph():
    """The compiler sees the GPU path whole, and expects of each operator the shape that the operator gives."""
    block = randomize_(blocks.BasicBlock(16, 32, 2)).eval().requires_grad_(False)
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
        for device, kernel in ((simulated(), "_conv_bn_relu_fwd_kernel"), (cuda_device(), "conv_bn_relu_fwd_kernel<")):
            with device as running:
                (y,) = graph(*inputs)
                for conv in (block.conv1, block.conv2, block.downsample[0]):
                    packed = torch.ops.resnet_fast.pack_conv_bn(conv.weight, None, None, None, None, None, 0.0)
                    assert packed.shape in shapes.values()
            assert len([name for name, _ in running.launches if name.startswith(kernel)]) == 3
            assert_error_rule(y, copy.deepcopy(block).double()(x.double()), [eager])

"""Fused networks in other dtypes and formats, in parallel, compiled, exported, frozen, checkpointed."""

import copy
import socket

import pytest
import torch
from helpers.fuse_checks import prepared
from helpers.fuse_support import X, assert_fused, fused_names, pair
from helpers.support import assert_error_rule, assert_same_model, eager_results
from torch import nn

import resnet_fast
from resnet_fast import backends, reference


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
    x = torch.randn(X)
    with backends.use("cpu"):
        assert torch.allclose(fused(x), net(x), rtol=1e-4, atol=1e-5)
    assert list(fused.state_dict()) == list(net.state_dict())


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
    return [str(n.target) for n in graph_module.graph.nodes if "conv_chain" in str(n.target)]


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
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    with backends.use("cpu"):
        program = torch.export.export(fused, (x,), dynamic_shapes=shapes)
    plain = torch.export.export(fused, (x,), dynamic_shapes=shapes)
    assert len(operators(program.graph_module)) == 4
    assert len(operators(plain.graph_module)) == 0
    for made in (program, plain):
        assert_same_model(made.module(), net, torch.randn(5, 3, 16, 16))


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

"""Layers by the libraries' fused kernels: which filters may hold batch norm's scale, whose shift is added later."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers.support import assert_error_rule, computing, randomize_
from torch import nn

import resnet_fast
from resnet_fast import backends, blocks, reference
from resnet_fast.chain.inference import Chain
from resnet_fast.chain.record import ChainRecorder, sources_of
from resnet_fast.gpu import convolution as layers
from resnet_fast.gpu import library, packing, plan, tune
from resnet_fast.gpu.layer import Layer
from resnet_fast.ops.chain import cuda_unpack
from resnet_fast.ops.spec import RELU


@pytest.fixture
def libraries(monkeypatch):
    """The libraries' operators on the CPU, in terms of PyTorch's own; gives the names of those that were called."""
    called = []

    def relu(x, weight, bias, stride, padding, dilation, groups):
        called.append("relu")
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))

    def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        called.append("add_relu")
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z)

    def addmm(bias, a, b):
        called.append("addmm")
        return F.relu(torch.addmm(bias, a, b))

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    monkeypatch.setattr(torch, "_addmm_activation", addmm)
    return called


def layer(**changes):
    sizes = (2, 9, 7, 16, 32, (3, 3), (1, 1), (1, 1), torch.float32, "ieee", False, True)
    return dataclasses.replace(Layer(*sizes, folded=True), **changes)


POINTWISE = {"kernel": (1, 1), "padding": (0, 0)}


@pytest.mark.parametrize(
    ("choice", "changes"),
    [
        (library.CUDNN, {}),
        (library.CUDNN, {"residual": True}),
        (library.CUDNN, {"relu": False}),
        (library.CUDNN, {"relu": False, "shifted": False, "stride": (2, 2)}),
        (library.CUDNN, {"kernel": (3, 1), "padding": (1, 0), "stride": (1, 2)}),
        (library.CUBLASLT, POINTWISE),
        (library.CUBLASLT, {**POINTWISE, "relu": False}),
    ],
    ids=str,
)
def test_what_they_compute(libraries, choice, changes):
    kind = layer(**changes)
    assert choice in library.candidates(kind)
    x, filters, residual = layers.operands(kind, torch.device("cpu"))
    y = layers.run(kind, choice, x, filters, residual)
    shift = filters.shift.double() if kind.shifted else None
    exact = F.conv2d(x.double(), filters.weight.permute(0, 3, 1, 2).double(), shift, kind.stride, kind.padding)
    exact = exact + residual.double() if kind.residual else exact
    exact = exact.relu() if kind.relu else exact
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)


def test_what_they_cannot_run():
    assert library.candidates(layer(residual=True, relu=False)) == []
    assert library.candidates(layer(**POINTWISE, residual=True)) == [library.CUDNN]
    assert library.candidates(layer(**POINTWISE, relu=False, shifted=False)) == [library.CUDNN]
    kind = layer()
    x, filters, residual = layers.operands(kind, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="cudnn wants filters that hold batch norm's scale"):
        layers.run(kind, library.CUDNN, x, dataclasses.replace(filters, bias=None), residual)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_filters_that_keep_their_precision_may_hold_the_scale(dtype):
    weight, scale = torch.randn(32, 16, 3, 3) * 0.1, torch.rand(32) + 0.5
    tiny, huge = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    assert library.folds(weight, scale, dtype)
    assert library.folds(weight, torch.zeros(32), dtype)  # a channel that is pruned
    assert not library.folds(weight, scale.clone().index_fill_(0, torch.tensor(3), tiny), dtype)
    weight = weight.double()
    assert not library.folds(weight, scale.double().index_fill_(0, torch.tensor(3), 100.0 * huge), dtype)
    assert not library.folds(weight.index_fill_(0, torch.tensor(5), torch.nan), scale, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kernel", "channels"), [(3, 16), (3, 64), (1, 256), (7, 3)])
def test_folded_layers_keep_the_error_rule(dtype, kernel, channels):
    """The arithmetic of the library: products of what is stored, added up without rounding, the result rounded once."""
    for seed in range(4):
        torch.manual_seed(seed)
        conv, bn = nn.Conv2d(channels, 32, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(32)
        pair = randomize_(nn.Sequential(conv, bn).eval()).to(dtype)
        x = torch.randn(2, channels, 12, 11).relu().to(dtype)
        exact = copy.deepcopy(pair).double()(x.double())
        weight, *vectors = sources_of(conv, bn)
        scale, shift = packing.scale_shift(weight, vectors, bn.eps)
        assert library.folds(conv.weight, scale, dtype)
        packed = packing.packed(conv.weight.detach(), scale, shift, dtype, folded=True)
        weight, ones, _, bias = cuda_unpack(packed, (32, kernel, kernel, channels), dtype)
        assert torch.equal(ones, torch.ones(32))
        out = F.conv2d(x.double(), weight.permute(0, 3, 1, 2).double(), bias.double(), padding=kernel // 2).to(dtype)
        rounded = F.conv2d(x.double(), conv.weight.double(), padding=kernel // 2).to(dtype)
        assert_error_rule(out, exact, [bn(rounded)], f"seed {seed}")


def chain_of(module):
    recorder = ChainRecorder()
    module.emit(recorder, 0)
    return Chain(module.parts(), recorder)


def test_whose_shift_is_added_later():
    """The projection of a block, and nothing that goes through a ReLU, has a residual, or is read twice."""
    stage = blocks.Stage(blocks.BasicBlock(16, 32, 2), blocks.BasicBlock(32, 32)).eval()
    specs = chain_of(stage).specs
    (projection,) = [i for i, spec in enumerate(specs) if spec.kernel == (1, 1)]
    (reader,) = [i for i, spec in enumerate(specs) if spec.residual == projection + 1]
    assert plan.deferred(specs) == {projection: reader}
    with_relu = [*specs]
    with_relu[projection] = specs[projection]._replace(flags=RELU)
    assert plan.deferred(with_relu) == {}
    read_twice = [*specs[:-1], specs[-1]._replace(source=projection + 1)]
    assert plan.deferred(read_twice) == {}
    assert plan.deferred(specs[: projection + 1]) == {}  # it is the chain's result


def test_a_bottleneck_stage_by_libraries_alone(simulated_device, libraries, monkeypatch):
    """Stem, projection and both residual forms; nothing is launched, every layer is one call."""
    torch.manual_seed(0)
    fast = randomize_(resnet_fast.blocks.Stage(blocks.Bottleneck(16, 8, 2), blocks.Bottleneck(32, 8)).eval())
    twin = nn.Sequential(reference.Bottleneck(16, 8, 2), reference.Bottleneck(32, 8)).eval()
    twin.load_state_dict(fast.state_dict())
    x = torch.randn(2, 16, 9, 8)
    monkeypatch.setattr(tune, "candidates", lambda layer, gpu, backend="auto": library.candidates(layer))
    monkeypatch.setattr(tune, "default", lambda layer, gpu, backend="auto": library.candidates(layer)[0])
    with torch.no_grad():
        y = fast(x)
        exact = copy.deepcopy(twin).double()(x.double())
        assert_error_rule(y, exact, [twin(x)])
    assert computing(simulated_device) == []
    assert sorted(libraries) == ["add_relu"] * 2 + ["relu"] * 4
    assert backends.fallbacks() == {}


def test_filters_are_packed_for_their_choice(simulated_device, libraries, monkeypatch):
    """A layer whose filters may not be folded keeps to a kernel that scales in float32."""
    block = randomize_(blocks.BasicBlock(16, 16).eval()).half()
    with torch.no_grad():
        block.conv2.weight *= 2.0**-20  # subnormal once the scale is in them
    default = tune.default

    def libraries_first(layer, *rest):
        return library.CUDNN if layer.folded else default(layer, *rest)

    monkeypatch.setattr(tune, "default", libraries_first)
    with torch.no_grad():
        block(torch.randn(1, 16, 8, 8).half())
    assert libraries == ["relu"]
    assert len(computing(simulated_device)) == 1

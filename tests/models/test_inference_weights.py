"""Weights made, moved or loaded in inference mode: they run fused, and what is done to them is seen."""

import pytest
import torch
from helpers.changes import FUSED_AFTERWARDS, check, fill, pair_of_blocks
from helpers.fuse_support import fused_names
from helpers.support import assert_same_model, randomize_, twins
from torch import nn

import resnet_fast
from resnet_fast import backends, reference
from resnet_fast.chain import guard as watch
from resnet_fast.chain.guard import StalenessGuard


def built(make):
    """``make`` gives models; here it is called in inference mode, where their weights are made."""
    with torch.inference_mode():
        return make()


def moved(make):
    models = make()
    with torch.inference_mode():
        return [m.double().float() for m in models]


def loaded(make):
    models = make()
    with torch.inference_mode():
        for m in models:
            m.load_state_dict({k: v.clone() for k, v in m.state_dict().items()}, assign=True)
    return models


def small():
    return twins(resnet_fast.cifar_resnet20, reference.cifar_resnet20)


def stem_and_pool():
    return twins(lambda: resnet_fast.ResNet32(image_size=64), lambda: reference.ResNet32(image_size=64))


class Net(nn.Module):
    """Somebody's own, with the code of the block in it."""

    def __init__(self):
        super().__init__()
        self.block, self.head = reference.BasicBlock(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(self.block(x).mean((2, 3)))


def converted():
    eager = randomize_(Net().eval())
    fast = Net().eval()
    fast.load_state_dict(eager.state_dict())
    return resnet_fast.fuse(fast, inplace=True), eager


MODELS = {
    "block": (pair_of_blocks, (2, 16, 7, 7)),
    "small network, one image": (small, (1, 3, 16, 16)),
    "small network": (small, (6, 3, 16, 16)),
    "network with a pooled stem": (stem_and_pool, (2, 3, 64, 64)),
    "fused afterwards": (converted, (2, 16, 7, 7)),
}
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "plain": torch.enable_grad}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", [built, moved, loaded])
def test_they_run_fused(how, name, mode):
    make, shape = MODELS[name]
    fast, eager = how(make)
    x = torch.randn(shape)
    assert any(t.is_inference() for t in fast.state_dict().values())
    for m in (fast, eager):
        m.eval().requires_grad_(False)  # plainly called, such weights must not want a gradient: see below
    if name == "fused afterwards":
        assert fused_names(fast) == ["block"]
    with MODES[mode](), backends.use("cpu"):
        for _ in range(2):
            assert_same_model(fast, eager, x)
    assert backends.fallbacks() == {}


def error_of(call):
    with pytest.raises(RuntimeError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_refused_as_pytorch_refuses_them(name, training):
    make, shape = MODELS[name]
    fast, eager = built(make)
    for m in (fast, eager):
        m.train(training)
    x = torch.randn(shape)
    message = error_of(lambda: eager(x))
    assert "Inference tensors cannot be saved for backward" in message
    assert error_of(lambda: fast(x)) == message


@pytest.mark.parametrize("name", MODELS)
def test_training_mode_without_gradients(name):
    """Statistics cannot be kept outside of inference mode: all is left as PyTorch leaves it then. Inside they are."""
    make, shape = MODELS[name]
    fast, eager = built(make)
    for m in (fast, eager):
        m.train()
    x = torch.randn(shape)
    before = {k: v.clone() for k, v in fast.state_dict().items()}
    with torch.no_grad():
        message = error_of(lambda: eager(x))
        assert "Inplace update to inference tensor outside InferenceMode" in message
        assert error_of(lambda: fast(x)) == message
    assert all(torch.equal(v, fast.state_dict()[k]) for k, v in eager.state_dict().items())
    with torch.inference_mode():
        assert torch.allclose(fast(x), eager(x), rtol=1e-3, atol=1e-4)
        for key, value in eager.state_dict().items():
            assert torch.allclose(fast.state_dict()[key].float(), value.float(), rtol=1e-3, atol=1e-5), key
            assert torch.equal(value, before[key]) == ("running" not in key and "batches" not in key)
        for m in (fast, eager):
            m.eval()
        with backends.use("cpu"):
            assert_same_model(fast, eager, x)


WHOLE = {
    "all parameters": lambda m: [p.add_(0.1) for p in m.parameters()],
    "copied into": lambda m: [p.copy_(fill(p)) for p in m.parameters()],
    "all buffers": lambda m: [b.mul_(2) for b in m.buffers() if b.is_floating_point()],
    "signs": lambda m: m.conv2.weight.neg_(),
    "bias of a batch norm": lambda m: m.bn2.bias.add_(1),
    "zeros": lambda m: m.conv1.weight.zero_(),
    "to bfloat16 and back": lambda m: m.bfloat16().float(),
}
# What no tensor made in inference mode can be used for.
CHANGES = {name: c for name, c in FUSED_AFTERWARDS.items() if name != "a step of training"} | WHOLE


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("how", [built, moved])
def test_changes_are_seen_at_the_next_call(how, name):
    fast, eager = how(pair_of_blocks)
    x = torch.randn(2, 16, 7, 7)
    with torch.inference_mode():
        check(fast, eager, CHANGES[name], x)
        with backends.use("cpu"):
            assert_same_model(fast, eager, x)
    assert backends.fallbacks() == {}


@pytest.mark.parametrize("momentum", [0.1, None])
@torch.no_grad()
def test_training_mode_after_a_move(momentum):
    """Counts of batches are not moved to another dtype; where they can be counted, PyTorch keeps statistics."""
    fast, eager = moved(pair_of_blocks)
    x = torch.randn(3, 16, 7, 7)
    for m in (fast, eager):
        m.train()
        m.bn1.momentum = m.bn2.momentum = momentum
    assert torch.allclose(fast(x), eager(x), rtol=1e-3, atol=1e-4)
    for key, value in eager.state_dict().items():
        assert torch.allclose(fast.state_dict()[key].float(), value.float(), rtol=1e-3, atol=1e-5), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_another_dtype(dtype):
    fast, eager = built(small)
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode(), backends.use("cpu"):
        fast(x)
        for m in (fast, eager):
            m.to(dtype)
        assert_same_model(fast, eager, x.to(dtype), "features")
        for m in (fast, eager):
            m.to("cpu", torch.float32)
        assert_same_model(fast, eager, x, "features")


@torch.inference_mode()
def test_a_single_element_is_not_seen_before_refresh():
    fast, eager = pair_of_blocks()
    x = torch.randn(2, 16, 7, 7)
    before = fast(x)
    for m in (fast, eager):
        m.conv1.weight.view(-1)[700] = 5
    assert torch.equal(fast(x), before)
    resnet_fast.refresh(fast)
    with backends.use("cpu"):
        assert_same_model(fast, eager, x)
    assert not torch.equal(fast(x), before)


@pytest.mark.parametrize("part", ["", "layer1", "layer1.0", "layer1.0.conv1"])
@pytest.mark.parametrize("images", [1, 6])
@torch.no_grad()
def test_refresh_of_weights_that_pytorch_counts(part, images):
    """One element, through ``Tensor.data``, which it does not count."""
    fast, eager = small()
    x = torch.randn(images, 3, 16, 16)
    before = fast(x)
    for m in (fast, eager):
        m.layer1[0].conv1.weight.data.view(-1)[700] = 5
    assert torch.equal(fast(x), before)
    resnet_fast.refresh(fast.get_submodule(part))
    with backends.use("cpu"):
        assert_same_model(fast, eager, x, "features")
    assert not torch.equal(fast(x), before)


def test_refresh_in_training_mode():
    fast, _ = pair_of_blocks()
    x = torch.randn(2, 16, 7, 7)
    fast.train()(x)
    program = fast._program
    fast(x)
    assert fast._program is program
    resnet_fast.refresh(fast)
    fast(x)
    assert fast._program is not program


def load_anew(m):
    m.load_state_dict({k: fill(v).abs() if v.is_floating_point() else v for k, v in m.state_dict().items()})


def double_then(then):
    def change(m):
        for p in m.parameters():
            p.mul_(1.5)
        then(m)

    return change


# Seen on devices whose memory the host must not read at every call.
TOLD = {
    "load_state_dict": load_anew,
    "load_state_dict of what is around it": lambda m: load_anew(nn.Sequential(m)),
    "load_state_dict of a part": lambda m: load_anew(next(c for c in m.modules() if isinstance(c, PARTS))),
    "eval": double_then(lambda m: m.eval()),
    "eval of what is around it": double_then(lambda m: nn.Sequential(m).eval()),
    "train and eval": double_then(lambda m: m.train().eval()),
    "refresh": double_then(resnet_fast.refresh),
    "data": lambda m: [setattr(p, "data", p.data * 2) for p in m.parameters()],
    "dtype": lambda m: m.bfloat16().float(),
}
PARTS = (reference.Block, reference.BasicBlock)


@pytest.mark.parametrize("name", TOLD)
@pytest.mark.parametrize("model", ["block", "small network, one image", "small network", "fused afterwards"])
def test_what_is_seen_where_contents_cannot_be_read(model, name, monkeypatch):
    monkeypatch.setattr(watch, "_extent", lambda t: None)
    make, shape = MODELS[model]
    x = torch.randn(shape)
    fast, eager = built(make)
    with torch.inference_mode(), backends.use("cpu"):
        before = fast(x)
        for m in (fast, eager):
            TOLD[name](m)
        assert_same_model(fast, eager, x)
        assert not torch.equal(fast(x), before)


@torch.inference_mode()
def test_what_is_not_seen_where_contents_cannot_be_read(monkeypatch):
    """As the docstring of refresh says."""
    x = torch.randn(2, 16, 7, 7)
    monkeypatch.setattr(watch, "_extent", lambda t: None)
    fast, _ = pair_of_blocks()
    before = fast(x)
    fast.conv1.weight.mul_(2)
    assert torch.equal(fast(x), before)
    fast.eval()
    assert not torch.equal(fast(x), before)


@torch.inference_mode()
def test_nothing_is_packed_twice():
    fast, _ = small()
    x = torch.randn(2, 3, 16, 16)
    fast(x)
    chain = fast.whole()._chain
    assert chain is not None
    for _ in range(3):
        fast(x)
    assert fast.whole()._chain is chain


def test_watches_are_not_kept():
    """Those that are told of a change are found by weak references."""
    before = len(watch._guards)
    with torch.inference_mode():
        fast, _ = pair_of_blocks()
        fast(torch.randn(2, 16, 7, 7))
    assert len(watch._guards) == before + 1
    assert isinstance(next(w for w in watch._guards if id(fast) in w.modules), StalenessGuard)
    fast._chain = None
    assert len(watch._guards) == before

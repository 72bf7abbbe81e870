"""The memory format of results is eager's, so that ``view`` works where it does there; so are the masks of dropouts."""

import copy

import pytest
import torch
from helpers.support import EAGER_LAYOUTS, channels_last, twins
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fast
from resnet_fast import backends, blocks, models, reference
from resnet_fast.chain.pooling import MaxPool2d

NETWORKS = {
    "CifarResNet": ((1,), {}, 8),
    "ResNet": (([1, 1, 1, 1],), {}, 34),
    "ResNet32": ((), {"image_size": 35}, 35),
}
BLOCKS = {"Block": (8, 16, 2), "BasicBlock": (8, 8), "Bottleneck": (16, 4)}


def network(name, training=False, images=2):
    """ResNet32's blocks are many: where a test is about stages, ResNet has all that it has."""
    args, kwargs, size = NETWORKS[name]
    fast, eager = twins(getattr(models, name), getattr(reference, name), *args, **kwargs)
    return fast.train(training), eager.train(training), torch.randn(images, 3, size, size)


def results(module, x, method="__call__", seed=0):
    torch.manual_seed(seed)
    return getattr(module, method)(x)


def assert_as_eager(fast, eager, x, method="__call__"):
    ours, theirs = results(fast, x, method), results(eager, x, method)
    assert ours.stride() == theirs.stride()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("of_weights", EAGER_LAYOUTS, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, training, of_weights):
    fast, eager, x = network(name, training)
    fast, eager = (m.to(memory_format=of_weights) for m in (fast, eager))
    for layout in EAGER_LAYOUTS:
        for method in ("features", "stem", "pooled_stem"):
            if hasattr(eager, method):
                for grad in (False, True)[: 1 + (name != "ResNet32")]:
                    with torch.set_grad_enabled(grad):
                        assert_as_eager(fast, eager, x.contiguous(memory_format=layout), method)


@pytest.mark.parametrize("shape", [(2, 5, 6), (2, 1, 2), (3, 1, 4)], ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_and_stages(kind, shape):
    fast, eager = twins(getattr(blocks, kind), getattr(reference, kind), *BLOCKS[kind])
    x = torch.randn(shape[0], BLOCKS[kind][0], *shape[1:])
    pairs = [(fast, eager), (resnet_fast.fuse(eager), eager)]
    if kind == "BasicBlock":
        pairs.append((blocks.Stage(fast, copy.deepcopy(fast)), nn.Sequential(eager, copy.deepcopy(eager))))
    for ours, theirs in pairs:
        # Of a single pixel eager's batch norm makes a contiguous map in either format, and so of an empty batch.
        for layout in EAGER_LAYOUTS if shape[1] > 2 else EAGER_LAYOUTS[:1]:
            given = x.contiguous(memory_format=layout)
            assert_as_eager(ours.eval(), theirs.eval(), given)
            assert_as_eager(*(copy.deepcopy(m).train() for m in (ours, theirs)), given)
        assert_as_eager(ours.eval(), theirs.eval(), x[:0])


def test_a_convolution_in_channels_last_turns_what_follows():
    for turning in ("conv1", "conv2"):
        fast, eager = twins(blocks.Block, reference.Block, 8, 8, 1)
        for m in (fast, eager):
            getattr(m, turning).to(memory_format=torch.channels_last)
        for training in (False, True):
            assert_as_eager(fast.train(training), eager.train(training), torch.randn(2, 8, 6, 6))
        assert not fast(torch.randn(2, 8, 6, 6)).is_contiguous()


def test_a_channel_alone_stays_contiguous_for_what_reads_it():
    """Both formats fit a map of one channel; the next convolution asks for the strides."""
    fast, eager = twins(blocks.Block, reference.Block, 3, 1, 1)
    after = nn.Conv2d(1, 4, 3)
    x = torch.randn(2, 3, 6, 6)
    assert after(fast(x)).stride() == after(eager(x)).stride() == (64, 16, 4, 1)


class Copies(TorchDispatchMode):
    """Names of the operators that copied an image."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if ("clone" in name or "copy" in name) and args[0].dim() == 4:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NETWORKS)
def test_maps_are_not_copied_between_stages(name):
    fast, _, x = network(name)
    with torch.no_grad(), Copies() as copies:
        fast(x)
        assert copies.found == []
        fast.features(x)
    assert len(copies.found) == 1  # the last map
    x = channels_last(x)
    with torch.no_grad(), Copies() as copies:
        fast.features(x)
    assert copies.found == []


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
@pytest.mark.parametrize("name", ["CifarResNet", "ResNet"])
def test_hooks_see_maps_as_eager_lays_them_out(name, kind):
    fast, eager, x = network(name)
    with torch.no_grad():
        fast(x)  # packed before there is a hook
    for place in ("layer2", "layer2.0", *(("layer2.0.conv2",) if kind != "backward" else ())):
        seen = []
        for m in (fast, eager):
            child = m.get_submodule(place)
            note = seen.append
            if kind == "forward":
                handle = child.register_forward_hook(lambda _, i, o, note=note: note((i[0].stride(), o.stride())))
            elif kind == "pre":
                handle = child.register_forward_pre_hook(lambda _, i, note=note: note(i[0].stride()))
            else:
                handle = child.register_full_backward_hook(lambda _, i, o, note=note: note(o[0].stride()))
            m(x).sum().backward()
            handle.remove()
        assert seen[0] == seen[1], place
    with backends.use("cpu"), torch.no_grad(), Copies() as copies:
        fast(x)
    assert copies.found == []


class Attention(nn.Module):
    def forward(self, x):
        return x * x.view(x.shape[0], x.shape[1], -1).mean(2).sigmoid()[:, :, None, None]


@pytest.mark.parametrize("name", ["CifarResNet", "ResNet"])
def test_modules_of_others_may_ask_for_view(name):
    fast, eager, x = network(name)
    with torch.no_grad():
        fast(x)
        for m in (fast, eager):
            m.layer2 = nn.Sequential(m.layer2, Attention())
        assert_as_eager(fast, eager, x)
        assert_as_eager(fast, eager, x, "features")


class OwnStem(models.ResNet):
    def stem(self, x):
        y = super().stem(x)
        return y.view(y.shape[0], -1).view(y.shape)


class OwnFlat(models.ResNet):
    def flat(self, x):
        return x.view(x.shape[0], x.shape[1], -1).mean(2)


class OwnFeatures(models.ResNet):
    def features(self, x):
        return super().features(x).view(x.shape[0], -1, 1, 1)[:, :512]


@pytest.mark.parametrize("kind", [OwnStem, OwnFlat, OwnFeatures])
def test_subclasses_may_ask_for_view(kind):
    model, x = kind([1, 1, 1, 1], 10).eval(), torch.randn(2, 3, 32, 32)
    for training in (False, True):
        assert model.train(training)(x).shape == (2, 10)
    assert model.features(x).is_contiguous()


def test_an_instance_may_have_a_flat_of_its_own():
    fast, eager, x = network("CifarResNet")
    for m in (fast, eager):
        m.flat = lambda y: y.view(y.shape[0], y.shape[1], -1).amax(2)
    assert_as_eager(fast, eager, x)


def test_max_pooling_in_training():
    x = torch.randn(2, 8, 9, 7, requires_grad=True)
    for layout in EAGER_LAYOUTS:
        assert_as_eager(MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1), x.contiguous(memory_format=layout))


@pytest.mark.parametrize("layout", EAGER_LAYOUTS, ids=str)
def test_dropout_draws_eagers_mask(layout):
    fast, eager = twins(models.ResNet32, reference.ResNet32, image_size=35, dropout=0.4)
    x = torch.randn(2, 3, 35, 35).contiguous(memory_format=layout)
    pairs = [(fast, eager), (fast.layer2[0], eager.layer2[0]), (resnet_fast.fuse(eager), eager)]
    for ours, theirs in pairs:
        given = x if hasattr(ours, "features") else torch.randn(2, 64, 6, 5).contiguous(memory_format=layout)
        method = "features" if hasattr(ours, "features") else "__call__"
        ours, theirs = (results(m.train(), given, method, seed=5) for m in (ours, theirs))
        assert torch.equal(ours == 0, theirs == 0)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_dropout_comes_and_goes():
    fast, _ = twins(models.ResNet32, reference.ResNet32, image_size=35)
    x = torch.randn(2, 3, 35, 35)
    fast.train()

    def copied():
        with torch.no_grad(), Copies() as copies:
            fast(x)
        return len(copies.found)

    none = copied()
    fast.layer3[1].dropout.p = 0.5
    assert copied() > none
    fast.layer3[1].dropout.p = 0.0
    assert copied() == none


def test_operators_give_channels_last():
    """As their documentation says: layers in a row would copy each map twice otherwise."""
    x, weight = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
    y = resnet_fast.ops.conv_bn_relu(x, weight)
    assert y.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        y.view(2, -1)

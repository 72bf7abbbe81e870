"""Training mode: the fused forward and backward against eager PyTorch and float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.support import (
    EAGER_LAYOUTS,
    WINOGRAD_FACTOR,
    assert_error_rule,
    exact_kernels,
    permuted,
    twins,
)
from helpers.training_support import assert_trains_as_eager, step
from torch import nn

import resnet_fast
from resnet_fast import backends, blocks, reference

KINDS = ("Block", "BasicBlock", "Bottleneck")
MODELS = [
    ("cifar_resnet20", (), {}, (4, 3, 16, 16)),
    ("resnet18", (10,), {}, (2, 3, 64, 64)),
    ("resnet50", (10,), {}, (2, 3, 64, 64)),
    ("ResNet32", (), {"image_size": 67, "dropout": 0.3}, (2, 3, 67, 67)),
]


def assert_trains_as_eager_on_the_whole(fast, eager, draws):
    """For bfloat16: gradients err by the few ReLUs whose sign rounding turns, ten times as much as by all other
    roundings, so that eager's error on a single draw is luck. The rule is for all draws together."""
    runs = []
    for x, grad in draws:
        with backends.use("cpu"):
            ours = step(copy.deepcopy(fast), x, grad)
        layouts = [(copy.deepcopy(eager).to(memory_format=m), x.contiguous(memory_format=m)) for m in EAGER_LAYOUTS]
        exact = step(copy.deepcopy(eager).double(), x.double(), grad)
        runs.append((ours, exact, *(step(model, image, grad) for model, image in layouts)))
    for name, value in runs[0][0].items():
        if value.is_floating_point():
            ours, exact, *theirs = (torch.cat([r[name].flatten() for r in rs]) for rs in zip(*runs, strict=True))
            assert_error_rule(ours, exact, theirs, name, WINOGRAD_FACTOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(16, 24, 7, 9), (5, 7, 9, 6), (64, 64, 14, 14), (32, 16, 3, 2)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks(kind, stride, shape, dtype):
    channels, out_channels, *size = shape
    args = (channels, out_channels, stride)
    fast, eager = (m.to(dtype) for m in twins(getattr(blocks, kind), getattr(reference, kind), *args))

    def draw(batch):
        x = torch.randn(batch, channels, *size).to(dtype)
        with torch.no_grad():
            return x, torch.randn_like(eager(x))

    if dtype == torch.bfloat16:
        batch = 1 + 600 // (size[0] * size[1])  # as many ReLUs for small maps as for large ones
        assert_trains_as_eager_on_the_whole(fast, eager, [draw(batch) for _ in range(8)])
    else:
        assert_trains_as_eager(fast, eager, *draw(3))
    assert backends.fallbacks() == {}


@pytest.mark.parametrize("kind", KINDS)
def test_direct_kernels_are_within_twice_the_error(kind):
    fast, eager = twins(getattr(blocks, kind), getattr(reference, kind), 32, 32, 1)
    x = torch.randn(2, 32, 12, 12)
    with exact_kernels():
        assert_trains_as_eager(fast, eager, x, torch.randn(eager(x).shape), factor=2)


@pytest.mark.parametrize(("name", "args", "kwargs", "shape"), MODELS, ids=lambda v: v if isinstance(v, str) else "")
def test_models(name, args, kwargs, shape):
    fast, eager = twins(getattr(resnet_fast, name), getattr(reference, name), *args, **kwargs)
    # Dropout draws its mask in the order of memory.
    x, target = torch.randn(shape).to(memory_format=torch.channels_last), torch.arange(shape[0]) % 2
    eager = eager.to(memory_format=torch.channels_last)
    losses, states = [], []
    for m in (fast, eager, copy.deepcopy(eager).double()):
        torch.manual_seed(1)
        m.train()
        loss = F.cross_entropy(getattr(m, "logits", m)(x.to(next(m.parameters()).dtype)), target)
        loss.backward()
        losses.append(loss)
        states.append({k: p.grad for k, p in m.named_parameters()} | dict(m.named_buffers()))
    assert torch.isclose(losses[0].double(), losses[2], rtol=1e-5)
    assert list(fast.state_dict()) == list(eager.state_dict())
    ours, theirs, exact = states
    # One parameter of many may have a gradient that eager hits by luck: the rule is for all of them together.
    for part in ("weight", "bias", "running_mean", "running_var"):
        names = [k for k in ours if k.endswith(part)]
        a, b, e = (torch.cat([s[k].flatten() / exact[k].norm().add(1e-12) for k in names]) for s in states)
        assert_error_rule(a, e, [b], part, WINOGRAD_FACTOR)
    for k in ours:
        assert ours[k].is_floating_point() or torch.equal(ours[k], theirs[k]), k


def loss_curve(m, x):
    images, target = x.to(next(m.parameters()).dtype), torch.arange(len(x)) % 10
    optimizer = torch.optim.SGD(m.train().parameters(), lr=0.003, momentum=0.9)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = F.cross_entropy(m(images), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def nudged(m, seed):
    """Weights moved by 1e-6 of their size, which is what one Winograd convolution may err."""
    generator = torch.Generator().manual_seed(seed)
    m = copy.deepcopy(m)
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(1 + 1e-6 * torch.randn(p.shape, generator=generator))
    return m


def test_losses_of_fifty_steps():
    """Training is chaotic: any rounding grows, in jumps. The fused curve drifts from float64's at most four times what
    eager's does five steps later when its first weights move by 1e-6 (measured: 0.7 times, at the same step)."""
    torch.manual_seed(0)
    x = torch.randn(16, 3, 16, 16)
    fast, eager = twins(resnet_fast.CifarResNet, reference.CifarResNet, 1)
    exact = loss_curve(copy.deepcopy(eager).double(), x)
    assert exact[-1] < 0.75 * exact[0]

    def drift(m):
        return (loss_curve(m, x) - exact).abs().cummax(0).values

    bound = torch.stack([drift(nudged(eager, seed)) for seed in range(3)]).amax(0)
    with backends.use("cpu"):
        ours = drift(fast)
    assert (ours[:-5] <= 4 * bound[5:] + 1e-6).all(), (ours, bound)


@pytest.mark.parametrize(
    ("kind", "args"),
    [("BasicBlock", (2, 2, 1)), ("BasicBlock", (2, 3, 2)), ("Bottleneck", (4, 2, 2)), ("Block", (2, 3, 2))],
)
@pytest.mark.parametrize("variant", ["", "affine=False", "eval", "no statistics"])
def test_gradients_by_differences(kind, args, variant):
    m = twins(getattr(blocks, kind), getattr(reference, kind), *args)[0].double().train()
    for name, bn in list(m.named_modules()):
        if isinstance(bn, nn.BatchNorm2d) and variant:
            new = nn.BatchNorm2d(
                bn.num_features, affine=variant != "affine=False", track_running_stats=variant != "no statistics"
            ).double()
            new.train(variant != "eval")
            parent = m.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], new)
    x = torch.randn(2, args[0], 5, 4, dtype=torch.float64)
    names, parameters = zip(*m.named_parameters(), strict=True)

    def run(x, *tensors):
        return torch.func.functional_call(m, dict(zip(names, tensors, strict=True)), (x,))

    leaves = [t.detach().clone().requires_grad_() for t in (x, *parameters)]
    with backends.use("cpu"):
        assert torch.autograd.gradcheck(run, leaves, nondet_tol=0)


@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 0.3}, {"affine": False}, {"eps": 0.1}], ids=str)
def test_running_statistics(options):
    fast, eager = twins(blocks.BasicBlock, reference.BasicBlock, 8, 8)
    for m in (fast, eager):
        m.bn1 = nn.BatchNorm2d(8, **options)
    exact = copy.deepcopy(eager).double()
    for m in (fast, eager, exact):
        m.train()
        torch.manual_seed(3)
        for i in range(3):
            m(torch.randn(4, 8, 6, 6).to(next(m.parameters()).dtype) * (i + 1))
    assert backends.fallbacks() == {}
    for key, value in fast.state_dict().items():
        assert_error_rule(value.float(), exact.state_dict()[key], [eager.state_dict()[key].float()], key)
    assert fast.bn1.num_batches_tracked == 3
    assert fast.bn2.num_batches_tracked == 3


def test_batch_norm_without_statistics():
    fast, eager = twins(blocks.BasicBlock, reference.BasicBlock, 8, 8)
    for m in (fast, eager):
        m.bn1 = nn.BatchNorm2d(8, track_running_stats=False)
    assert_trains_as_eager(fast, eager, torch.randn(4, 8, 6, 6))


class FrozenBatchNorm:
    """A block that trains while its batch norms stay in eval mode, as detectors do."""

    def train(self, mode=True):
        super().train(mode)
        self.bn1.eval()
        return self


def test_batch_norm_in_eval_mode_inside_a_training_block():
    class Fast(FrozenBatchNorm, blocks.BasicBlock):
        pass

    class Eager(FrozenBatchNorm, reference.BasicBlock):
        pass

    fast, eager = twins(Fast, Eager, 16, 16)
    before = fast.bn1.running_mean.clone()
    x = torch.randn(3, 16, 7, 7)
    assert_trains_as_eager(fast, eager, x, torch.randn(3, 16, 7, 7))
    assert torch.equal(fast.bn1.running_mean, before)
    assert not torch.equal(fast.bn2.running_mean, eager.bn2.running_mean)


@pytest.mark.parametrize("offset", [100.0, 1e4])
def test_the_variance_of_large_means_does_not_cancel(offset):
    fast, eager = twins(blocks.BasicBlock, reference.BasicBlock, 8, 8)
    x, grad = torch.randn(4, 8, 9, 9), torch.randn(4, 8, 9, 9)
    assert_trains_as_eager(copy.deepcopy(fast), eager, x + offset, grad)
    for m in (fast, eager):
        m.conv1.bias = nn.Parameter(torch.full((8,), offset))
    assert_trains_as_eager(fast, eager, x, grad)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last, None])
def test_any_layout(layout):
    fast, _ = twins(blocks.BasicBlock, reference.BasicBlock, 16, 24, 2)
    x, grad = torch.randn(3, 16, 9, 7), torch.randn(3, 24, 5, 4)
    expected = step(copy.deepcopy(fast), x, grad)
    with backends.use("cpu"):
        got = step(
            fast,
            permuted(x) if layout is None else x.contiguous(memory_format=layout),
            permuted(grad) if layout is None else grad.contiguous(memory_format=layout),
        )
    for name, value in got.items():
        assert value is None or torch.equal(value, expected[name]), name


def test_the_same_from_run_to_run():
    m = twins(blocks.Bottleneck, reference.Bottleneck, 64, 32, 2)[0]
    x = torch.randn(5, 64, 15, 15)
    first, second = step(copy.deepcopy(m), x), step(m, x)
    for name, value in first.items():
        assert value is None or torch.equal(value, second[name]), name


@pytest.mark.parametrize("stride", [1, 2])
def test_dropout_follows_the_fused_block(stride):
    fast, eager = twins(blocks.Block, reference.Block, 16, 16, stride, 0.4)
    # The mask is drawn in the order of memory.
    x = torch.randn(3, 16, 8, 6).to(memory_format=torch.channels_last)
    with backends.use("cpu"):
        ours = step(fast, x)
    exact, theirs = (
        step(copy.deepcopy(eager).double(), x.double()),
        step(eager.to(memory_format=torch.channels_last), x),
    )
    assert torch.equal(ours["output"] == 0, theirs["output"] == 0)
    for name, value in ours.items():
        if value.is_floating_point() and name not in ("conv1.bias", "conv2.bias", "downsample.0.bias"):
            assert_error_rule(value, exact[name], [theirs[name]], name, WINOGRAD_FACTOR)


def test_one_value_per_channel_raises_as_eager():
    fast, eager = twins(blocks.BasicBlock, reference.BasicBlock, 8, 8)
    before = copy.deepcopy(fast.state_dict())
    for m in (fast, eager):
        with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got input size"):
            m.train()(torch.randn(1, 8, 1, 1))
    assert all(torch.equal(before[k], v) for k, v in fast.state_dict().items())


def test_nan_reaches_every_gradient():
    fast, eager = twins(blocks.BasicBlock, reference.BasicBlock, 8, 8)
    x = torch.randn(2, 8, 6, 6)
    x[1, 3, 2, 2] = torch.nan
    ours, theirs = step(fast, x), step(eager, x)
    for name in theirs:
        assert torch.equal(ours[name].isnan(), theirs[name].isnan()), name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.conv1.register_forward_hook(lambda *_: None), "hook"),
        (lambda m: m.conv1.register_full_backward_hook(lambda *_: None), "hook"),
        (lambda m: setattr(m, "relu", nn.GELU()), "GELU"),
        (lambda m: nn.utils.parametrizations.spectral_norm(m.conv1), "Parametrized"),
    ],
)
def test_what_is_no_longer_the_pattern_runs_unfused(change, reason):
    m = blocks.BasicBlock(8, 8)
    change(m)
    m.train()(torch.randn(2, 8, 6, 6)).sum().backward()
    assert any(reason.lower() in key.lower() for key in backends.fallbacks()), backends.fallbacks()
    with backends.use("cpu"), pytest.raises(RuntimeError, match="(?i)" + reason):
        m.train()(torch.randn(2, 8, 6, 6))

"""What training keeps for the backward pass: counted, for eager and fused networks alike; max pooling; recomputing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.support import channels_last, permuted, twins
from torch import nn

import resnet_fast
from benchmarks.memory import peak_bytes, saved_bytes
from resnet_fast import backends, blocks, reference
from resnet_fast.chain.executor import FusedModule
from resnet_fast.chain.pooling import MaxPool2d


@pytest.fixture(autouse=True)
def keep_outputs():
    yield
    backends.training.recompute_outputs = False


@pytest.mark.parametrize(
    ("name", "shape", "most", "recomputed"),
    [
        ("ResNet32", (2, 3, 224, 224), 0.65, 0.52),
        ("cifar_resnet32", (8, 3, 32, 32), 0.75, 0.52),
        ("resnet50", (2, 3, 64, 64), 0.81, 0.62),
    ],
)
def test_bytes_kept_for_the_backward_pass(name, shape, most, recomputed):
    fast, eager = twins(getattr(resnet_fast, name), getattr(reference, name))
    x = channels_last(torch.randn(shape))

    def kept(m):
        run = getattr(m.train(), "logits", m)
        return saved_bytes(m, lambda: run(x))

    theirs = kept(eager)
    ratio = kept(fast) / theirs
    backends.training.recompute_outputs = True
    less = kept(fast) / theirs
    print(f"{name}: {theirs} bytes eager, {ratio:.3f} fused, {less:.3f} with outputs recomputed")
    assert ratio <= most
    assert less <= recomputed


def test_a_backward_pass_lets_go_of_maps_on_the_way():
    """At its peak a step holds little more than what is kept; a graph that is kept can be used again."""
    torch.manual_seed(0)
    model, x = resnet_fast.cifar_resnet20().train(), channels_last(torch.randn(64, 3, 32, 32))
    map_bytes = x[:, :1].nbytes * 16
    for recompute, beside in ((False, 2), (True, 4.5)):  # in maps of the first stage, where the pass ends
        backends.training.recompute_outputs = recompute
        model(x).square().sum().backward()
        kept = saved_bytes(model, lambda: model(x))
        assert kept < peak_bytes(lambda: model(x).square().sum().backward()) <= kept + beside * map_bytes
    y = model(x[:8]).square().sum()
    weights = list(model.parameters())
    once, again = (torch.autograd.grad(y, weights, retain_graph=keep) for keep in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward()


def test_the_counter_counts():
    """A map each for the two convolutions of eager PyTorch, one for the ReLU between, which is its own second input."""
    m = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    x = torch.randn(2, 4, 5, 5)
    assert saved_bytes(m, lambda: m(x)) == 2 * x.nbytes


class Hoarder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.hidden = [x + 1]
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_the_counter_looks_into_contexts():
    x = torch.randn(3, 5, requires_grad=True)
    assert saved_bytes(nn.Identity(), lambda: Hoarder.apply(x)) == x.nbytes


@pytest.mark.parametrize("kind", ["Block", "BasicBlock", "Bottleneck"])
def test_recomputed_outputs_change_no_bit(kind):
    block = getattr(blocks, kind)
    wide = 16 * getattr(block, "expansion", 1)
    m = blocks.Stage(block(16, 16, 2), *(block(wide, 16, 1) for _ in range(5))).train()
    x = torch.randn(3, 16, 9, 7)
    results = []
    for recompute in (False, True):
        backends.training.recompute_outputs = recompute
        own, copied = x.clone().requires_grad_(), copy.deepcopy(m)
        y = copied(own)
        y.square().mean().backward()
        results.append([y, own.grad, *(p.grad for p in copied.parameters()), *copied.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Long(FusedModule, nn.Module):
    """Each sum adds what was two sums before: nowhere could the chain be cut."""

    def __init__(self, count=6):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(count))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(count))
        self.relu = nn.ReLU()

    def parts(self):
        return [self, *self.convs, *self.norms, self.relu]

    def emit(self, build, x):
        values = [x, x]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            values.append(build.conv(conv, norm, values[-1], relu=self.relu, residual=values[-2]))
        return values[-1]

    def forward(self, x):
        return self.fused(x)


def test_sums_that_are_added_later_are_formed_again():
    torch.manual_seed(0)
    m, x = Long().train(), torch.randn(2, 8, 6, 5)
    grads = []
    for recompute in (False, True):
        backends.training.recompute_outputs = recompute
        grads.append(torch.autograd.grad(copy.deepcopy(m)(own := x.clone().requires_grad_()).square().sum(), own)[0])
    assert torch.equal(*grads)


POOLS = [
    ((2, 3, 8, 8), {"kernel_size": 2}),
    ((3, 5, 9, 7), {"kernel_size": 2}),
    ((2, 64, 13, 16), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ((1, 3, 7, 5), {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0), "ceil_mode": True}),
    ((40, 16, 18, 17), {"kernel_size": 4, "stride": 3}),
]


@pytest.mark.parametrize("values", ["random", "ties", "nan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "options"), POOLS, ids=str)
def test_max_pooling_equals_pytorchs(shape, options, dtype, values):
    x = torch.randn(shape).to(dtype)
    if values == "ties":
        x = torch.zeros(shape, dtype=dtype)
    elif values == "nan":
        x[0, 1, 2:4, 3] = torch.nan
    results = []
    # Where windows overlap, gradients are summed in float32 and rounded once.
    for kind, layout, wide in ((MaxPool2d, permuted, dtype), (nn.MaxPool2d, channels_last, torch.float32)):
        own = layout(x.to(wide, copy=True)).requires_grad_()
        y = kind(**options).train()(own)
        y.backward(torch.arange(y.numel()).view(y.shape).to(dtype).to(wide))
        results.append((y.to(dtype), own.grad.to(dtype)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_max_pooling(dtype):
    x, window = channels_last(torch.randn(2, 5, 9, 8).to(dtype)), ([3, 2], [2, 2], [1, 0])
    torch.library.opcheck(torch.ops.resnet_fast.max_pool, (x, *window, True))
    y, argmax = torch.ops.resnet_fast.max_pool(x, *window, False)
    torch.library.opcheck(torch.ops.resnet_fast.max_pool_backward, (y, argmax, [9, 8], *window))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": [5, 4]}, "kernel is 5 x 4"),
        ({"stride": [0, 1]}, r"stride is \[0, 1\]"),
        ({"padding": [2, 0]}, "padding is 2 x 0"),
        ({"x": torch.zeros(2, 3, 4, 4)}, "not contiguous in channels_last"),
        ({"x": channels_last(torch.zeros(2, 3, 1, 4))}, "smaller than the window"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_broken_arguments_of_max_pooling(change, message):
    arguments = {"x": channels_last(torch.zeros(2, 3, 4, 4)), "kernel": [2, 2], "stride": [2, 2], "padding": [0, 0]}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.resnet_fast.max_pool(**(arguments | change), ceil_mode=False)
    y, argmax = torch.ops.resnet_fast.max_pool(**arguments, ceil_mode=False)
    with pytest.raises(RuntimeError, match="argmax has shape"):
        torch.ops.resnet_fast.max_pool_backward(y, argmax[:-1], [4, 4], [2, 2], [2, 2], [0, 0])


def test_max_pooling_keeps_half_a_byte_an_output():
    pool, x = MaxPool2d(2).train(), torch.randn(2, 3, 9, 7, requires_grad=True)
    assert saved_bytes(pool, lambda: pool(x)) == 2 * 3 * 4 * 3 // 2


@pytest.mark.parametrize("case", ["eval", "eager", "large window", "narrow", "three dimensions", "vmap"])
def test_max_pooling_runs_pytorchs_where_it_does_not_fit(case):
    pool = MaxPool2d(5 if case == "large window" else 3, padding=1).train(case != "eval")
    x = torch.randn(2, 3, 9, 2 if case == "narrow" else 9, requires_grad=True)
    x = x[0] if case == "three dimensions" else x
    with backends.use("eager" if case == "eager" else "auto"):
        y = torch.func.vmap(pool)(x[None])[0] if case == "vmap" else pool(x)
    assert torch.equal(y, F.max_pool2d(x, pool.kernel_size, padding=1))
    assert "_MaxPool" not in str(y.grad_fn)

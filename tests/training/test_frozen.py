"""Eval mode with gradients: the fused backward by given statistics against eager PyTorch and float64."""

import copy

import pytest
import torch
from helpers.support import (
    EAGER_LAYOUTS,
    WINOGRAD_FACTOR,
    assert_error_rule,
    exact_kernels,
    permuted,
    randomize_,
    shallow,
    twins,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fast
from benchmarks.memory import saved_bytes
from resnet_fast import backends, blocks, models, reference
from resnet_fast.chain.executor import FusedModule
from resnet_fast.chain.training.frozen import FrozenProgram

KINDS = ("Block", "BasicBlock", "Bottleneck")


class Calls(TorchDispatchMode):
    """The arguments of each call of an operator, and the names of all."""

    def __init__(self, name):
        super().__init__()
        self.name, self.found, self.names = name, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        if func.__name__.startswith(self.name + "."):
            self.found.append(args)
        return func(*args, **(kwargs or {}))


def weighted(y):
    return (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()


def gradients(m, x, autocast=False):
    """The result, and gradients of x and of the parameters, where they require one."""
    own = x.detach().clone().requires_grad_(x.requires_grad)
    m.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = m(own)
    weighted(y).backward()
    return [y.detach(), own.grad, *(p.grad for p in m.parameters())]


def assert_as_eager(fast, eager, x):
    """In float64, where both are exact but for their last digits. On the fused kernels, backward included."""
    with backends.use("cpu"), Calls("conv_backward") as calls:
        ours = gradients(fast, x)
    theirs = gradients(eager, x)
    assert calls.found
    assert not any("aten.convolution" in name or "batch_norm" in name for name in calls.names)
    for mine, right in zip(ours, theirs, strict=True):
        assert (mine is None) == (right is None)
        assert mine is None or (mine.dtype == right.dtype and mine.stride() == right.stride())
        assert mine is None or torch.allclose(mine, right, rtol=1e-8, atol=1e-9)
    return calls.found


@pytest.mark.parametrize("shape", [(2, 32, 24, 23), (3, 16, 7, 5)], ids=["winograd", "direct"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_by_the_error_rule(kind, shape):
    fast, eager = twins(getattr(blocks, kind), getattr(reference, kind), shape[1], 32, 1)
    x = torch.randn(shape).requires_grad_()
    exact = gradients(copy.deepcopy(eager).double(), x.double())
    theirs = [gradients(copy.deepcopy(eager).to(memory_format=m), x.contiguous(memory_format=m)) for m in EAGER_LAYOUTS]
    for factor in (WINOGRAD_FACTOR, 2):
        with backends.use("cpu"):
            ours = gradients(fast, x)
            if factor == 2:
                with exact_kernels():
                    ours = gradients(fast, x)
        for i, name in enumerate(["output", "x", *(k for k, _ in fast.named_parameters())]):
            assert_error_rule(ours[i], exact[i], [t[i] for t in theirs], name, factor)


@pytest.mark.parametrize("name", ["CifarResNet", "ResNet of basic blocks", "ResNet of bottlenecks"])
@pytest.mark.parametrize("kind", ["own", "foreign"])
def test_networks_by_the_error_rule(kind, name):
    """The rule is for all parameters of a kind together: eager hits the gradient of one of many by luck."""
    eager = randomize_(shallow(reference, name)).eval()
    fast = resnet_fast.fuse(eager) if kind == "foreign" else shallow(models, name).eval()
    fast.load_state_dict(eager.state_dict())
    x = torch.randn(2, 3, 48, 48).requires_grad_()
    with backends.use("cpu"):
        ours = gradients(fast, x)
    exact = gradients(copy.deepcopy(eager).double(), x.double())
    theirs = [gradients(copy.deepcopy(eager).to(memory_format=m), x.contiguous(memory_format=m)) for m in EAGER_LAYOUTS]
    names = ["output", "x", *(f"{p.dim()} {k.rpartition('.')[2]}" for k, p in fast.named_parameters())]
    for part in dict.fromkeys(names[1:]):
        places = [i for i, n in enumerate(names) if n == part]
        a, e, *b = (
            torch.cat([(side[i].double() / exact[i].norm().add(1e-12)).flatten() for i in places])
            for side in (ours, exact, *theirs)
        )
        assert_error_rule(a.float(), e, b, part)


FROZEN = {
    "x": lambda m, x: x.requires_grad_(False),
    "weights": lambda m, x: m.requires_grad_(False),
    "convolutions": lambda m, x: [p.requires_grad_(False) for p in m.parameters() if p.dim() == 4],
    "batch norms": lambda m, x: [p.requires_grad_(False) for p in m.parameters() if p.dim() == 1],
    "gammas": lambda m, x: [p.requires_grad_(False) for k, p in m.named_parameters() if k[-8:-3] in ("1.wei", "2.wei")],
    "all but the last convolution": lambda m, x: [
        x.requires_grad_(False),
        m.requires_grad_(False),
        m.conv2.weight.requires_grad_(),
    ],
    "all but a beta and x": lambda m, x: [m.requires_grad_(False), m.bn1.bias.requires_grad_()],
    "all but the projection's": lambda m, x: [m.requires_grad_(False), m.downsample.requires_grad_()],
    "the projection": lambda m, x: m.downsample.requires_grad_(False),
}


@pytest.mark.parametrize("frozen", ["nothing", *FROZEN])
@pytest.mark.parametrize("kind", KINDS)
def test_mixes_of_what_requires_a_gradient(kind, frozen):
    fast, eager = (m.double() for m in twins(getattr(blocks, kind), getattr(reference, kind), 4, 6, 2))
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64).requires_grad_()
    if frozen != "nothing":
        FROZEN[frozen](fast, x)
        FROZEN[frozen](eager, x)
    assert_as_eager(fast, eager, x)


class Unusual(nn.Module):
    """A batch norm without ReLU that a convolution reads, and one that is added; a map that two of them read; biases;
    batch norms without parameters."""

    def __init__(self, affine):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(4, 4, k, padding=k // 2, bias=i % 2 == 0) for i, k in enumerate((3, 1, 3, 1))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(4, affine=affine) for _ in range(4))
        self.relu = nn.ReLU()

    def forward(self, x):
        y = self.norms[0](self.convs[0](x))
        y = self.relu(self.norms[1](self.convs[1](y)))
        z = self.norms[2](self.convs[2](y))
        return self.relu(self.norms[3](self.convs[3](y)) + z)


@pytest.mark.parametrize("frozen", ["nothing", "weights", "batch norms", "convolutions"])
@pytest.mark.parametrize("affine", [True, False])
def test_unusual_dataflow(affine, frozen):
    torch.manual_seed(0)
    eager = Unusual(affine).double().eval()
    for norm in eager.norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    fast = resnet_fast.fuse(eager)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64).requires_grad_()
    if frozen != "nothing":
        FROZEN[frozen](fast, x)
        FROZEN[frozen](eager, x)
    assert_as_eager(fast, eager, x)


def test_gradients_of_the_input_alone():
    """No work for weights that require a gradient, if this pass goes on to the input alone; and the other way round."""
    fast, eager = (m.double() for m in twins(models.CifarResNet, reference.CifarResNet, 1))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64).requires_grad_()
    theirs = torch.autograd.grad(weighted(eager(x)), x)[0]
    loss = weighted(fast(x))
    with backends.use("cpu"), Calls("conv_backward") as calls:
        ours = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.allclose(ours, theirs)
    assert [args[10:12] for args in calls.found] == [(True, False)] * 9
    assert not any(args[14] for args in calls.found)  # sums for gammas
    with Calls("conv_backward") as calls:
        torch.autograd.grad(loss, [fast.layer3[0].conv2.weight, fast.layer3[0].bn1.weight], retain_graph=True)
    assert [args[10:12] for args in calls.found] == [(True, True)]
    with Calls("conv_backward") as calls:
        loss.backward(inputs=[fast.layer3[0].conv2.weight])
    assert [args[10:12] for args in calls.found] == [(False, True)]


@pytest.mark.parametrize("layout", [permuted, *(lambda t, m=m: t.contiguous(memory_format=m) for m in EAGER_LAYOUTS)])
def test_any_layout(layout):
    fast, eager = (m.double() for m in twins(blocks.BasicBlock, reference.BasicBlock, 6, 8, 2))
    x = torch.randn(3, 6, 7, 5, dtype=torch.float64)
    own = layout(x).requires_grad_()
    loss = weighted(fast(own))
    (ours,) = torch.autograd.grad(loss, own)
    (theirs,) = torch.autograd.grad(weighted(eager(own)), own)
    assert torch.allclose(ours, theirs)
    assert ours.stride() == theirs.stride()


def test_graphs_that_are_kept_and_freed():
    fast, _ = twins(blocks.BasicBlock, reference.BasicBlock, 8, 12, 2)
    x = torch.randn(2, 8, 6, 6).requires_grad_()
    loss = weighted(fast(x))
    first = torch.autograd.grad(loss, [x, *fast.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *fast.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({t.untyped_storage().data_ptr() for t in first}) == len(first)  # none overwrites another
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_autocast():
    fast, eager = twins(blocks.BasicBlock, reference.BasicBlock, 16, 16)
    runs = []
    for seed in range(6):
        x = torch.randn(4, 16, 12, 12, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        with backends.use("cpu"):
            ours = gradients(fast, x, autocast=True)
        runs.append((ours, gradients(eager, x, autocast=True), gradients(copy.deepcopy(eager).double(), x.double())))
    for i in range(len(runs[0][0])):
        ours, theirs, exact = (torch.cat([run[k][i].flatten().double() for run in runs]) for k in range(3))
        assert runs[0][0][i].dtype == runs[0][1][i].dtype
        # Few ReLUs turn by rounding, and outweigh the rest: the rule is for all draws together.
        assert (ours - exact).norm() <= WINOGRAD_FACTOR * (theirs - exact).norm()


def test_an_empty_batch():
    fast, eager = twins(blocks.BasicBlock, reference.BasicBlock, 4, 6, 2)
    for m in (fast, eager):
        found = gradients(m, torch.zeros(0, 4, 6, 6).requires_grad_())
        assert found[1].shape == (0, 4, 6, 6)
        assert not any(g.any() for g in found[2:])
    assert backends.fallbacks() == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_spreads_as_in_eager(value):
    fast, eager = twins(blocks.BasicBlock, reference.BasicBlock, 32, 32)
    x = torch.randn(2, 32, 24, 24)
    x[0, 3, 11, 6] = value
    x.requires_grad_()
    ours, theirs = fast(x), eager(x)
    assert ours.requires_grad
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    assert theirs.isfinite().any()
    assert torch.allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("frozen", "most"), [("nothing", 0.76), ("gammas", 0.53), ("weights", 0.53), ("all but the last", 1.7)]
)
def test_bytes_kept_for_the_backward_pass(frozen, most, monkeypatch):
    """Of a block of two convolutions eager keeps 4 maps, this 3: y of both and the sum; without gammas 2. The input
    of a chain is always kept, for second derivatives."""
    fast, eager = twins(models.cifar_resnet20, reference.cifar_resnet20)
    x = torch.randn(8, 3, 32, 32).to(memory_format=torch.channels_last)
    kept = []
    for m in (fast, eager):
        if frozen == "gammas":
            for norm in (part for part in m.modules() if isinstance(part, nn.BatchNorm2d)):
                norm.weight.requires_grad_(False)
        elif frozen != "nothing":
            m.requires_grad_(False)
        if frozen == "all but the last":
            m.layer3[-1].conv2.requires_grad_(True)
        own = x.clone().requires_grad_(frozen == "weights")
        assert m.features(own).requires_grad
        kept.append(saved_bytes(m, lambda m=m, own=own: m.features(own)))
    print(f"{frozen} frozen: {kept[1]} bytes eager, {kept[0] / kept[1]:.3f} fused")
    assert 0 < kept[0] <= most * kept[1]
    if frozen == "nothing":
        monkeypatch.setattr(backends.training, "recompute_outputs", True)
        assert saved_bytes(fast, lambda: fast.features(x)) <= 0.55 * kept[1]


def test_what_changes_is_noticed():
    fast, eager = (m.double() for m in twins(models.CifarResNet, reference.CifarResNet, 1))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64).requires_grad_()
    assert_as_eager(fast, eager, x)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (fast, eager)]
    for optimizer in optimizers:
        optimizer.step()
    assert_as_eager(fast, eager, x)
    torch.manual_seed(3)
    other = nn.BatchNorm2d(16, eps=0.5, affine=False).double().eval()
    for m in (fast, eager):
        m.layer1[0].bn1 = copy.deepcopy(other)
        m.layer2.requires_grad_(False)
    assert_as_eager(fast, eager, x)
    for m in (fast, eager):
        m.requires_grad_(False)
    assert_as_eager(fast, eager, x)
    assert not fast(x.detach()).requires_grad


@pytest.mark.parametrize("images", [2, 6])
def test_frozen_stages_run_as_for_inference(images):
    fast, eager = (m.double() for m in twins(models.CifarResNet, reference.CifarResNet, 1))
    x = torch.randn(images, 3, 8, 8, dtype=torch.float64)
    for m in (fast, eager):
        m.requires_grad_(False)
        m.layer3.requires_grad_(True)
    with Calls("conv_chain") as calls:
        fast(x)
    assert len(calls.found) == 3  # stem and two stages
    calls = assert_as_eager(fast, eager, x)
    assert [args[10:12] for args in calls] == [(True, True), (False, True), (False, True)]


def test_networks_that_train_with_batch_norms_in_eval_mode(monkeypatch):
    fast, eager = (m.double() for m in twins(models.CifarResNet, reference.CifarResNet, 1))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64).requires_grad_()
    for m in (fast, eager):
        m.train()
        for norm in (part for part in m.modules() if isinstance(part, nn.BatchNorm2d)):
            norm.eval()
    before = copy.deepcopy(fast.state_dict())
    assert_as_eager(fast, eager, x)
    assert isinstance(fast.whole()._program, FrozenProgram)
    monkeypatch.setattr(backends.training, "recompute_outputs", True)
    assert_as_eager(fast, eager, x)
    assert all(torch.equal(t, before[k]) for k, t in fast.state_dict().items())
    for m in (fast, eager):
        m.layer1[0].bn1.train()
    assert_as_eager(fast, eager, x)
    assert not isinstance(fast.whole()._program, FrozenProgram)


class Plain(nn.Module):
    """No batch norm."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv2(self.relu(self.conv1(x)))


class FastPlain(FusedModule, Plain):
    def emit(self, build, x):
        return build.conv(self.conv2, None, build.conv(self.conv1, None, x, relu=self.relu))

    def forward(self, x):
        y = self.fused(x)
        return super().forward(x) if y is None else y


def test_chains_with_a_relu_without_batch_norm_run_again():
    """Fused forward; PyTorch's operators have the gradients, and no more of them than are asked for."""
    fast, eager = (m.double() for m in twins(FastPlain, Plain))
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64).requires_grad_()
    with backends.use("cpu"), Calls("conv_chain") as calls:
        ours = gradients(fast, x)
    assert len(calls.found) == 1
    assert all(torch.allclose(a, b) for a, b in zip(ours, gradients(eager, x), strict=True))
    loss = weighted(fast(x))
    with Calls("convolution_backward") as calls:
        torch.autograd.grad(loss, x)
    assert [args[-1] for args in calls.found] == [[True, False, False]] * 2

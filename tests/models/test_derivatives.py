"""Derivatives beyond the plain backward: forward-mode, second order, by ``torch.func``. Each is as eager gives it."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.fuse_checks import prepared
from helpers.support import twins
from torch import nn
from torch.autograd import forward_ad
from torch.autograd import functional as A
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fast
from resnet_fast import backends, blocks, models, ops, reference
from resnet_fast.chain.pooling import MaxPool2d
from resnet_fast.chain.sync_batch_norm import _Normalize

OPERATORS = ("conv_bn", "conv_bn_relu", "conv_bn_add_relu", "add_relu")
ONLY_OPERATORS = ("functional.jacobian by vmap", "functional.jacobian, forward")
MODULES = ("Block", "BasicBlock", "Bottleneck", "cifar_resnet20", "ResNet", "foreign")
TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-3}  # of the largest value


def like(x, seed=7):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def loss(f, x):
    """Its second derivative is not zero, even where ``f`` is piecewise linear."""
    return (f(x) * 0.3).sin().sum()


def penalty(f, x, wanted):
    """Gradients of the squared norm of a gradient whose incoming gradient requires none."""
    grads = torch.autograd.grad(loss(f, x), wanted, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)


def input_penalty(f, x):
    x = x.clone().requires_grad_()
    return penalty(f, x, [x])


def weight_penalty(f, x):
    return penalty(f, x, list(f.parameters()))


def dual(f, x, grad):
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, like(x)))).tangent


def dual_weights(f, x):
    weights = {k: v.detach() for k, v in f.named_parameters()}
    with torch.no_grad(), forward_ad.dual_level():
        duals = {k: forward_ad.make_dual(v, like(v)) for k, v in weights.items()}
        return forward_ad.unpack_dual(torch.func.functional_call(f, duals, x)).tangent


def batched_grads(f, x):
    x = x.clone().requires_grad_()
    y = f(x)
    grads = torch.stack([like(y, seed) for seed in range(3)])
    wanted = [x, *(f.parameters() if isinstance(f, nn.Module) else [])]
    return torch.autograd.grad(y, wanted, grads, is_grads_batched=True)


def grads_of_each(f, x):
    return torch.func.vmap(torch.func.grad(lambda image: loss(f, image[None])))(x)


def vjp_of_vjp(f, x):
    v = like(f(x))
    return A.vjp(lambda i: A.vjp(lambda j: f(j).sin(), i, v, create_graph=True)[1], x, like(x))[1]


DERIVATIVES = {
    "functional.jvp": lambda f, x: A.jvp(f, x, like(x))[1],
    "functional.vjp of vjp": vjp_of_vjp,
    "functional.hvp": lambda f, x: A.hvp(lambda i: loss(f, i), x, like(x))[1],
    "functional.hessian": lambda f, x: A.hessian(lambda i: loss(f, torch.cat([i, x[:, :, 1:]], 2)), x[:, :, :1]),
    "functional.jacobian by vmap": lambda f, x: A.jacobian(lambda i: f(i).sum((2, 3)), x, vectorize=True),
    "functional.jacobian, forward": lambda f, x: A.jacobian(
        lambda i: f(torch.cat([i, x[:, :, 1:]], 2)), x[:, :, :1], vectorize=True, strategy="forward-mode"
    ),
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (like(x),))[1],
    "func.grad": lambda f, x: torch.func.grad(lambda i: loss(f, i))(x),
    "func.jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(lambda i: loss(f, i)), (x,), (like(x),))[1],
    "vmap of func.grad": grads_of_each,
    "is_grads_batched": batched_grads,
    "input penalty": input_penalty,
    "weight penalty": weight_penalty,
    "dual": lambda f, x: dual(f, x, True),
    "dual, no_grad": lambda f, x: dual(f, x, False),
    "dual weights": dual_weights,
}


def assert_eagers(name, fast, eager, x):
    with backends.use("eager"):
        theirs = DERIVATIVES[name](eager, x)
    ours = DERIVATIVES[name](fast, x)
    ours, theirs = ([r] if isinstance(r, torch.Tensor) else list(r) for r in (ours, theirs))
    scale = max(t.abs().max() for t in theirs)
    assert scale > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).abs().max() <= TOLERANCES[x.dtype] * scale


def operator_pair(op, dtype):
    """The operator as a function of x, or its eager twin, other arguments fixed."""
    generator = torch.Generator().manual_seed(3)
    w, *vectors = (torch.randn(s, generator=generator, dtype=dtype) for s in ((3, 3, 3, 3), *[(3,)] * 4))
    var = torch.rand(3, generator=generator, dtype=dtype) + 0.5
    bias, gamma, beta, mean = vectors

    def eager(x):
        residual = x.flip(2)
        y = x
        if op != "add_relu":
            y = F.batch_norm(F.conv2d(x, w, bias, 1, 1), mean, var, gamma, beta)
        y = y + residual if "add" in op else y
        return F.relu(y) if "relu" in op else y

    def arguments(x):
        residual = [x.flip(2)] if "add" in op else []
        return [x, *residual] if op == "add_relu" else [x, *residual, w, bias, gamma, beta, mean, var]

    def fast(x):
        return getattr(ops, op)(*arguments(x), **({} if op == "add_relu" else {"padding": 1}))

    def direct(x):
        rest = [] if op == "add_relu" else [1e-5, [1, 1], [1, 1]]
        return getattr(torch.ops.resnet_fast, op)(*arguments(x), *rest)

    return fast, direct, eager


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", [n for n in DERIVATIVES if "weight" not in n])
@pytest.mark.parametrize("op", OPERATORS)
def test_operators(op, name, dtype):
    fast, direct, eager = operator_pair(op, dtype)
    x = torch.randn(2, 3, 5, 5, dtype=dtype)
    assert_eagers(name, fast, eager, x)
    assert_eagers(name, direct, eager, x)


@pytest.mark.parametrize("op", ["conv_bn", "conv_bn_relu"])
def test_operators_by_every_argument(op):
    """Second derivatives, and forward mode, by weights, batch norm and statistics, too."""
    shapes = [(2, 2, 4, 4), (2, 2, 3, 3), *[(2,)] * 5]
    inputs = [torch.randn(s, dtype=torch.float64) for s in shapes]
    inputs[-1] = inputs[-1].abs() + 0.5
    inputs = [t.requires_grad_() for t in inputs]
    call = getattr(ops, op)
    assert torch.autograd.gradgradcheck(call, inputs)
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)


def module_pair(name, training, dtype):
    if name == "foreign":
        eager = prepared(reference.BasicBlock(3, 3))
        fast = resnet_fast.fuse(eager)
    elif name == "ResNet":  # with max pooling behind the stem
        fast, eager = twins(models.ResNet, reference.ResNet, [1, 1, 1, 1], 10)
    elif name == "cifar_resnet20":
        fast, eager = twins(models.cifar_resnet20, reference.cifar_resnet20)
    else:
        fast, eager = twins(getattr(blocks, name), getattr(reference, name), 3, 8, 1)
    return [m.to(dtype).train(training) for m in (fast, eager)]


def module_input(name, dtype):
    size = 64 if name == "ResNet" else 8 if name == "cifar_resnet20" else 5
    return torch.randn(2, 3, size, size, dtype=dtype)


@pytest.mark.parametrize("name", [n for n in DERIVATIVES if n not in ("functional.hessian", *ONLY_OPERATORS)])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("module", MODULES)
def test_modules(module, training, name):
    fast, eager = module_pair(module, training, torch.float64)
    if training and "func." in name:  # which refuses to change captured statistics
        for norm in (m for twin in (fast, eager) for m in twin.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    assert_eagers(name, fast, eager, module_input(module, torch.float64))
    assert all(torch.allclose(a, b) for a, b in zip(fast.buffers(), eager.buffers(), strict=True))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_hessian_of_a_block(training):
    fast, eager = module_pair("Block", training, torch.float64)
    assert_eagers("functional.hessian", fast, eager, module_input("Block", torch.float64))


@pytest.mark.parametrize("name", ["functional.hvp", "input penalty", "weight penalty", "dual", "is_grads_batched"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_modules_in_float32(training, name):
    fast, eager = module_pair("BasicBlock", training, torch.float32)
    assert_eagers(name, fast, eager, module_input("BasicBlock", torch.float32))


@pytest.mark.parametrize("case", ["recompute", "frozen norms", "frozen weights", "channels_last", "input of a weight"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_penalties(training, case, monkeypatch):
    fast, eager = module_pair("BasicBlock", training, torch.float64)
    x = module_input("BasicBlock", torch.float64)
    monkeypatch.setattr(backends.training, "recompute_outputs", case == "recompute")
    results = []
    for m in (fast, eager):
        if case == "frozen norms":
            m.bn1.eval()
            m.bn2.eval()
        if case == "frozen weights":
            m.conv1.requires_grad_(False)
            m.bn2.requires_grad_(False)
        own = x.contiguous(memory_format=torch.channels_last if case == "channels_last" else torch.contiguous_format)
        own = own.clone().requires_grad_()
        given = own * m.conv2.weight.sum() if case == "input of a weight" else own
        results.append(penalty(m, given, [own, *(p for p in m.parameters() if p.requires_grad)]))
    assert backends.fallbacks() == {}  # the forward is fused
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_penalties_under_autocast(training):
    fast, eager = module_pair("BasicBlock", training, torch.float32)
    x = module_input("BasicBlock", torch.float32)
    exact = input_penalty(eager, x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = input_penalty(fast, x)[0], input_penalty(eager, x)[0]
    assert ours.dtype == theirs.dtype
    assert (ours - exact).norm() <= 2 * (theirs - exact).norm()


@pytest.mark.parametrize("name", ["functional.jvp", "input penalty", "is_grads_batched", "func.jvp", "dual, no_grad"])
@pytest.mark.parametrize("fused", [True, False])
def test_max_pooling(fused, name, monkeypatch):
    has_kernel = backends.has_kernel
    monkeypatch.setattr(
        backends, "has_kernel", lambda op, device: has_kernel(op, device) and (fused or "max" not in op)
    )
    fast, eager = MaxPool2d(3, 2, 1).train(), nn.MaxPool2d(3, 2, 1).train()
    assert_eagers(name, fast, eager, torch.randn(2, 3, 9, 7, dtype=torch.float64))


class Log(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_first_derivatives_stay_fused(training):
    fast, eager = module_pair("BasicBlock", training, torch.float32)
    x = module_input("BasicBlock", torch.float32)
    assert_eagers("dual", fast, eager, x)  # and leaves nothing behind
    assert set(backends.fallbacks(clear=True)) == {"BasicBlock: forward-mode differentiation"}
    with backends.use("cpu"):
        y = fast(x.requires_grad_()).sum()
        with Log() as log:
            y.backward()
    assert backends.fallbacks() == {}
    assert log.ops.count("resnet_fast.conv_backward.default") == 3
    assert not any("convolution" in op or "batch_norm" in op for op in log.ops)


def test_named_backends_refuse_forward_mode():
    fast, direct, _ = operator_pair("conv_bn_relu", torch.float32)
    x = torch.randn(2, 3, 5, 5)
    for f in (fast, direct, blocks.BasicBlock(3, 3).eval()):
        with backends.use("cpu"), pytest.raises(RuntimeError, match="cannot run fused: forward-mode differentiation"):
            dual(f, x, False)


def test_operators_without_derivatives_raise():
    m = blocks.BasicBlock(3, 3).eval()
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        m(x)
    chain = m._chain
    filters = chain.filters(x)

    def stage(x):
        return torch.ops.resnet_fast.conv_chain(x, filters, chain.layers)

    for name in ("dual", "dual, no_grad", "func.jvp"):
        with pytest.raises(RuntimeError, match="conv_chain has no derivative in forward mode"):
            DERIVATIVES[name](stage, x)
    with torch.no_grad(), forward_ad.dual_level():
        assert torch.equal(stage(x), m(x)) or torch.allclose(stage(x), m(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["input penalty", "functional.jvp", "dual", "dual, no_grad", "is_grads_batched"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiled_modules_give_or_refuse(training, name):
    """The operators of a compiled program under PyTorch's own autograd, which a backend without AOTAutograd leaves."""
    fast, eager = module_pair("BasicBlock", training, torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    x = module_input("BasicBlock", torch.float64)
    if training or name == "dual, no_grad":
        with pytest.raises(RuntimeError, match=r"resnet_fast::(train|conv)_chain"):
            DERIVATIVES[name](compiled, x)
    else:
        assert_eagers(name, compiled, eager, x)


def test_synchronised_batch_norm_refuses_second_derivatives(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = torch.randn(2, 3, 4, 4, requires_grad=True)
        y = _Normalize.apply(x, torch.ones(3), torch.zeros(3), 1e-5, dist.group.WORLD)[0]
        with pytest.raises(RuntimeError, match="SyncBatchNorm2d has no second derivatives"):
            torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        assert torch.autograd.grad(y.sin().sum(), x)[0].abs().max() > 0
    finally:
        dist.destroy_process_group()

"""Training steps under torch.compile: whole graphs of fused operators, the results of the fused modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.support import assert_error_rule, channels_last, twins
from torch import nn

import resnet_fast
from resnet_fast import backends, blocks, reference


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    backends.training.recompute_outputs = False


def steps(model, run, x, autocast=False, count=2):
    """Two steps of SGD: losses, gradients, weights and statistics."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = run(x)
        loss = y.float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(p.grad for p in model.parameters()), *model.state_dict().values()]


def assert_same_steps(model, x, **options):
    """Compiled in one graph without a fallback: bit for bit what the module gives uncompiled."""
    compiled = copy.deepcopy(model)
    with backends.use("cpu"):
        run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        ours, expected = steps(compiled, run, x, **options), steps(model, model, x, **options)
    assert backends.fallbacks() == {}
    for a, b in zip(ours, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def batch_norms(model, **options):
    for m in model.modules():
        for name, child in list(m.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(m, name, nn.BatchNorm2d(child.num_features, **options))
    return model


def frozen(model):
    """The first block's weights, and a batch norm in eval mode with it."""
    model.layer1.requires_grad_(False)
    model.layer1[0].bn1.eval()
    model.layer2[0].bn2.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m,
        lambda m: batch_norms(m, momentum=None),
        lambda m: batch_norms(m, affine=False),
        lambda m: batch_norms(m, track_running_stats=False),
        frozen,
    ],
    ids=["plain", "momentum=None", "affine=False", "no statistics", "frozen"],
)
def test_a_step_of_a_model(change):
    assert_same_steps(change(resnet_fast.CifarResNet(1).train()), channels_last(torch.randn(4, 3, 12, 12)))


@pytest.mark.parametrize("kind", ["Block", "BasicBlock", "Bottleneck"])
def test_a_step_of_a_block(kind):
    m = getattr(blocks, kind)(16, 8, 2).train()
    assert_same_steps(m, torch.randn(3, 16, 7, 6), autocast=True)
    backends.training.recompute_outputs = True
    assert_same_steps(m, torch.randn(3, 16, 7, 6))


def test_the_graph_has_an_operator_a_stage():
    seen = []

    def backend(graph, inputs):
        seen.append([str(n.target) for n in graph.graph.nodes if "resnet_fast" in str(n.target)])
        return graph

    model = resnet_fast.CifarResNet(1).train()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(torch.randn(2, 3, 8, 8))
    assert seen == [["resnet_fast.train_chain"] * 4]  # the stem and three stages
    assert model.layer1[0].bn1.num_batches_tracked == 1


def test_one_value_per_channel_raises():
    compiled = torch.compile(blocks.BasicBlock(8, 8).train(), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="Expected more than 1 value per channel"):
        compiled(torch.randn(1, 8, 1, 1))


def test_inductor():
    fast, eager = twins(blocks.BasicBlock, reference.BasicBlock, 8, 8)
    x, grad = torch.randn(3, 8, 6, 6), torch.randn(3, 8, 6, 6)
    compiled = torch.compile(fast.train(), fullgraph=True)
    exact = copy.deepcopy(eager).double()
    results = []
    for m, run in ((fast, compiled), (eager, eager.train()), (exact, exact.train())):
        own = x.detach().clone().to(m.conv1.weight.dtype).requires_grad_()
        run(own).backward(grad.to(own.dtype))
        results.append([own.grad, *(p.grad for p in m.parameters()), m.bn1.running_mean, m.bn2.running_var])
    for ours, theirs, e in zip(*results, strict=True):
        assert_error_rule(ours, e, [theirs], factor=3)  # two Winograd convolutions, one after the other


GIVEN = (8, 9)  # among the tensors of such a block: the statistics of the projection's batch norm


def operator_arguments(grad=True):
    """A block with a projection and a bias: of every kind of tensor some are there and some are not."""
    m = blocks.Block(4, 6, 2).train()
    m.downsample[1].eval()
    x = channels_last(torch.randn(2, 4, 6, 5)).requires_grad_(grad)
    seen = []

    def backend(graph, inputs):
        nodes = [n for n in graph.graph.nodes if "train_chain" in str(n.target)]
        values = dict(zip((n for n in graph.graph.nodes if n.op == "placeholder"), inputs, strict=True))
        seen.append(torch.fx.map_arg(nodes[0].args, lambda n: values[n].detach().requires_grad_(grad)))
        return graph

    torch.compile(m, fullgraph=True, backend=backend)(x)
    return seen[0]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_opcheck(recompute, grad):
    *arguments, _ = operator_arguments(grad)
    torch.library.opcheck(torch.ops.resnet_fast.train_chain, (*arguments, recompute))


def test_opcheck_of_the_backward():
    x, tensors, *settings, recompute = operator_arguments(False)
    out, *kept = torch.ops.resnet_fast.train_chain(x, tensors, *settings, recompute)
    needs = [True, *(i not in GIVEN for i in range(len(tensors)))]
    arguments = (torch.randn_like(out), x, tensors, [*kept, out], *settings, needs)
    torch.library.opcheck(torch.ops.resnet_fast.train_chain_backward, arguments)


def test_the_operator_in_float64_by_differences():
    x, tensors, *settings, recompute = operator_arguments(False)
    given = [t.double().requires_grad_(i - 1 not in GIVEN) for i, t in enumerate([x, *tensors])]

    def run(x, *tensors):
        return torch.ops.resnet_fast.train_chain(x, list(tensors), *settings, recompute)[0]

    assert torch.autograd.gradcheck(run, given, nondet_tol=0)
    y = run(*given)
    (grad,) = torch.autograd.grad(y.square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="train_chain_backward has no gradient of its own"):
        grad.sum().backward()
    assert F.relu(y).equal(y)

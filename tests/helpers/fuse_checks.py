"""What must hold for any network that ``fuse`` speeds up; shared by the tests of several collections of networks."""

import copy

import torch
from helpers.support import EAGER_LAYOUTS, WINOGRAD_FACTOR, assert_error_rule, randomize_
from torch import nn

import resnet_fast
from resnet_fast import backends
from resnet_fast.fusion.converted_module import ConvertedModule


def prepared(network):
    """With batch norms as after training, in eval mode."""
    return randomize_(network).eval()


def first_tensor(result):
    return first_tensor(next(iter(result))) if isinstance(result, (tuple, list)) else result


def unfused_reason(conv):
    """What must stand in the report for a convolution that no kernel can run."""
    if conv.groups != 1:
        return f"{conv.groups} groups"
    if conv.dilation != (1, 1):
        return f"dilation {conv.dilation}"
    return None


def check_report(fused, expected):
    """``expected``: fused convolutions, and all of them. Each of the others is named, with its reason."""
    report = resnet_fast.report(fused)
    assert (report.fused, report.layers) == expected, f"\n{report}"
    rows = {row.name: row for row in report.rows}
    named = 0
    for name, conv in fused.named_modules():
        if isinstance(conv, nn.Conv2d):
            reason = unfused_reason(conv)
            assert reason is None or rows[name].detail == reason, rows.get(name)
            named += name in rows
            assert name not in rows or (rows[name].status == "not fused" and rows[name].detail)
    assert named == report.layers - report.fused
    assert sum(row.layers for row in report.rows if row.status == "fused") == report.fused
    assert str(report).endswith(f"{report.fused} of {report.layers} convolutions fused")
    return report


def check_left_alone(network, fused):
    """Everything but the classes of fused modules is as it was, and comes back."""
    theirs, ours = dict(network.named_modules()), dict(fused.named_modules())
    assert list(ours) == list(theirs)
    assert not any(isinstance(m, ConvertedModule) for m in theirs.values())
    for name, m in ours.items():
        assert isinstance(m, type(theirs[name]))
        assert m.training == theirs[name].training
    assert list(fused.state_dict()) == list(network.state_dict())
    before = {name: t.clone() for name, t in network.state_dict().items()}
    fused.load_state_dict(network.state_dict(), strict=True)
    network.load_state_dict(fused.state_dict(), strict=True)
    for name, t in network.state_dict().items():
        assert torch.equal(t, before[name]), name
    back = resnet_fast.unfuse(fused)
    assert [type(m) for m in back.modules()] == [type(m) for m in theirs.values()]
    assert [vars(m).keys() for m in back.modules()] == [vars(m).keys() for m in theirs.values()]


@torch.no_grad()
def check_inference(network, fused, x, factor=2):
    """The last feature map by the error rule; nothing of what the report calls fused falls back."""
    network, fused = network.eval(), fused.eval()
    exact = first_tensor(copy.deepcopy(network).double()(x.double()))
    eager = [
        first_tensor(copy.deepcopy(network).to(memory_format=layout)(x.contiguous(memory_format=layout)))
        for layout in EAGER_LAYOUTS
    ]
    with backends.use("cpu"):
        for layout, theirs in zip(EAGER_LAYOUTS, eager, strict=True):
            out = first_tensor(copy.deepcopy(fused).to(memory_format=layout)(x.contiguous(memory_format=layout)))
            assert out.stride() == theirs.stride()
            assert_error_rule(out, exact, eager, factor=factor)
    assert backends.fallbacks() == {}, backends.fallbacks()


def training_step(m, x, weights):
    torch.manual_seed(1)  # of dropout
    m.train()
    x = x.clone().requires_grad_()
    y = first_tensor(m(x))
    y.backward(weights.to(y.dtype))
    return (
        {"output": y.detach(), "input": x.grad} | {k: p.grad for k, p in m.named_parameters()} | dict(m.named_buffers())
    )


def check_training(network, fused, x, factor=WINOGRAD_FACTOR):
    """Outputs, gradients and statistics of a step, by the error rule for all of a kind together: one parameter of many
    may have a gradient that eager hits by luck."""
    with torch.no_grad():
        weights = torch.randn_like(first_tensor(copy.deepcopy(network).train()(x)))
    with backends.use("cpu"):
        ours = training_step(copy.deepcopy(fused), x, weights)
    exact = training_step(copy.deepcopy(network).double(), x.double(), weights)
    theirs = [
        training_step(copy.deepcopy(network).to(memory_format=layout), x.contiguous(memory_format=layout), weights)
        for layout in EAGER_LAYOUTS
    ]
    assert list(ours) == list(exact)
    for kind in ("output", "input", "weight", "bias", "running_mean", "running_var"):
        names = [k for k in ours if k.endswith(kind) and exact[k] is not None]
        a, e, *b = (
            torch.cat([(side[k].double() / exact[k].norm().add(1e-12)).flatten() for k in names])
            for side in (ours, exact, *theirs)
        )
        assert_error_rule(a.float(), e, b, kind, factor)
    for k, value in ours.items():
        assert (value is None) == (theirs[0][k] is None), k
        assert value is None or value.is_floating_point() or torch.equal(value, theirs[0][k]), k


def check_network(network, x, expected, training=True, factor=2):
    """All of it; the fused network is returned."""
    fused = resnet_fast.fuse(network)
    check_report(fused, expected)
    check_left_alone(network, fused)
    check_inference(network, fused, x, factor)
    if training:
        check_training(network, fused, x)
    return fused

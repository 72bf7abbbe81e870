"""What was recorded for training is as the modules are: every change of them is seen at the next step."""

import pytest
import torch
from helpers.changes import FUSED_AFTERWARDS, UNFUSED_AFTERWARDS, pair_of_blocks

from resnet_fast import backends, blocks

# Of eval mode alone: batch norms that go on are training itself.
SHOWN = {name: reason for name, (_, reason) in UNFUSED_AFTERWARDS.items() if name != "batch norm that goes on"}
CHANGES = FUSED_AFTERWARDS | {name: change for name, (change, _) in UNFUSED_AFTERWARDS.items()}


def train_once(m, x):
    m.train().zero_grad()
    x = x.clone().requires_grad_()
    y = m(x)
    y.square().mean().backward()
    return y, x.grad, *(p.grad for p in m.parameters())


@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_two_steps(name):
    fast, eager = pair_of_blocks()
    x = torch.randn(3, 16, 8, 6)
    train_once(fast, x)
    train_once(eager, x)
    program = fast._program
    assert program is not None
    for m in (fast, eager):
        torch.manual_seed(0)  # for pruning
        with torch.no_grad():
            CHANGES[name](m)
    backends.fallbacks(clear=True)
    ours, theirs = train_once(fast, x), train_once(eager, x)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert b is None or torch.allclose(a, b, rtol=2e-3, atol=2e-5 * b.abs().max().item() + 1e-6), name
    for key, value in eager.state_dict().items():
        assert torch.allclose(fast.state_dict()[key].float(), value.float(), rtol=1e-3, atol=1e-5), key
    shown = [key for key in backends.fallbacks() if SHOWN.get(name, "-") in key]
    assert bool(shown) == (name in SHOWN), backends.fallbacks()


def test_nothing_is_recorded_twice():
    fast, _ = pair_of_blocks()
    x = torch.randn(3, 16, 8, 6)
    train_once(fast, x)
    program = fast._program
    train_once(fast, x)
    assert fast._program is program
    fast.eval().train()
    train_once(fast, x)
    assert fast._program is not program


def test_dropout_in_a_stage_that_is_switched_on():
    stage = blocks.Stage(blocks.Block(8, 8, 1), blocks.Block(8, 8, 1)).train()
    x = torch.randn(2, 8, 6, 6)
    stage(x)
    assert backends.fallbacks() == {}
    stage[0].dropout.p = 0.5
    y = stage(x)
    assert backends.fallbacks() == {"Stage: a Dropout in training mode": 1}
    assert y.shape == x.shape

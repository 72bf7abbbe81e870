"""``torch.compile(backend="resnet_fast")`` where code around the layers does more than compute. Eager PyTorch says what
is right."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.compiler_support import block, compiled, counts, graphs
from helpers.support import randomize_
from torch import nn
from torch.utils.checkpoint import checkpoint

from resnet_fast import backends


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    backends.fallbacks(clear=True)
    yield
    torch._dynamo.reset()


class Layers(nn.Module):
    """A convolution and a batch norm, whatever the code around them does."""

    def __init__(self):
        super().__init__()
        # No bias: before a batch norm its gradient is nothing but rounding.
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.flags, self.seen = {"skip": True}, []
        self.register_buffer("calls", torch.zeros(1))
        self.limit = 3

    def body(self, x):
        return self.norm(self.conv(x))


class Flag(Layers):
    def forward(self, x):
        return F.relu(self.body(x) + x) if self.flags["skip"] else F.relu(self.body(x))


class Counter(Layers):
    def forward(self, x):
        self.calls += 1
        return F.relu(self.body(x) + x) * self.calls


class Asks(Layers):
    def forward(self, x):
        if hasattr(x, "tensors"):
            x = x.tensors
        if isinstance(x, (list, tuple)):
            x = x[0]
        return F.relu(self.body(x) + x)


class Draws(Layers):
    def forward(self, x):
        return F.relu(self.body(x) + x) * float(np.random.rand())


class Catches(Layers):
    def forward(self, x):
        try:
            scale = self.flags["scale"]
        except KeyError:
            scale = 1.0
        return F.relu(self.body(x) + x) * scale


class Contexts(Layers):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))

    def forward(self, x):
        with torch.no_grad():
            y = F.relu(self.first(x))
        with torch.autocast("cpu", torch.bfloat16):
            y = F.relu(self.body(y) + y)
        return y.float() + x


class AcrossContexts(Layers):
    """Neither the convolution nor its batch norm may move across the switch."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.conv(x)
        return F.relu(self.norm(y))


class Breaks(Layers):
    def forward(self, x):
        y = F.relu(self.body(x) + x)
        torch._dynamo.graph_break()
        return F.relu(self.body(y) + x)


class Remembers(Layers):
    def forward(self, x):
        y = F.relu(self.body(x))
        self.seen.append(y.detach())
        self.limit -= 1
        return y if self.limit > 0 else y * 2


class Checkpoints(Layers):
    def forward(self, x):
        return F.relu(checkpoint(self.body, x, use_reentrant=False) + x)


class Writes(Layers):
    """A weight changes between the layers."""

    def forward(self, x):
        y = self.conv(x)
        self.norm.weight.data.mul_(1.5)
        return F.relu(self.norm(y) + x)


class Functions(Layers):
    """No modules are called: functions on parameters, settings by keyword."""

    def forward(self, x):
        y = F.conv2d(x, weight=self.conv.weight, bias=self.conv.bias, padding="same")
        n = self.norm
        y = F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias, self.training, momentum=0.3, eps=1e-3)
        return torch.relu(torch.add(y, x))


CLASSES = [
    Flag,
    Counter,
    Asks,
    Draws,
    Catches,
    Contexts,
    AcrossContexts,
    Breaks,
    Remembers,
    Checkpoints,
    Writes,
    Functions,
]


def outcome(m, x, step):
    """A call, its gradients, all that the module holds."""
    np.random.seed(step)
    m.flags["skip"] = step != 1
    m.zero_grad()
    x = x.clone()
    y = m(x)
    if y.requires_grad:
        y.float().square().sum().backward()
    grads = [p.grad for p in m.parameters() if p.grad is not None]
    return [t.detach().clone() for t in (y, x, *grads, *m.parameters(), *m.buffers(), *m.seen)]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("kind", CLASSES)
def test_python_around_the_layers(kind, training):
    eager = randomize_(kind()).train(training)
    fast = compiled(eager)
    x = torch.randn(2, 8, 9, 8)
    with graphs() as seen:
        for step in range(4):
            ours, theirs = outcome(fast, x, step), outcome(eager, x, step)
            assert len(ours) == len(theirs)
            rough = kind in (Contexts, AcrossContexts)
            for a, b in zip(ours, theirs, strict=True):
                assert a.dtype == b.dtype
                assert (a.double() - b.double()).norm() <= (0.05 if rough else 1e-4) * b.double().norm() + 1e-6
    fused, layers, _ = counts(seen)
    assert layers > 0
    # Writes and switched contexts between the layers keep their place.
    assert fused == (0 if kind in (Writes, AcrossContexts) else layers)
    assert backends.fallbacks() == {}


def test_what_the_executor_cannot_run_runs_as_the_graph_had_it():
    eager = block()
    fast = compiled(eager, fullgraph=True)
    x = torch.randn(2, 4, 9, 8)
    with torch.no_grad(), backends.use("eager"):
        assert torch.equal(fast(x), eager(x))
    assert list(backends.fallbacks()) == ["conv1 and what follows: backends.use('eager')"]
    backends.fallbacks(clear=True)
    half = compiled(eager.half(), fullgraph=True)
    with torch.no_grad():
        assert torch.equal(half(x.half()), eager(x.half()))
    assert list(backends.fallbacks()) == ["conv1 and what follows: no kernel for torch.float16"]


def test_the_draws_of_a_seed_stay():
    """Making modules for the executor draws no random numbers."""
    eager = block()
    fast = compiled(eager, fullgraph=True)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with torch.no_grad():
        fast(torch.ones(1, 4, 5, 5))
    assert torch.equal(torch.rand(4), expected)

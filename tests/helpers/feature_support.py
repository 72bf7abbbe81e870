"""How a feature of PyTorch meets a fused network: run on the network and on its eager twin, and what ran is looked at.

A check is a function of a network and images that does the same to both and returns tensors, or tensors and the network
that is to be looked at. Outcomes: ``fused``, ``unfused``, ``raises``, ``raises as eager``.
"""

import copy
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from helpers.support import randomize_, twins
from torch import nn

import resnet_fast
from resnet_fast import backends, models, reference
from resnet_fast.chain import inference
from resnet_fast.chain.training import frozen
from resnet_fast.chain.training import function as training

SIZE = 8


def native():
    """A network of this package, and its eager twin."""
    return twins(models.CifarResNet, reference.CifarResNet, 1)


def foreign():
    """Somebody's network, fused and as it was."""
    eager = randomize_(reference.CifarResNet(1)).eval()
    return resnet_fast.fuse(eager), eager


def block():
    return twins(resnet_fast.blocks.BasicBlock, reference.BasicBlock, 3, 3)


@dataclass
class Check:
    run: Callable
    networks: Callable
    tolerance: float
    gradients: bool
    error: str
    leaves_out: tuple[str, ...]


CHECKS: dict[str, Check] = {}


def check(feature, networks=native, tolerance=1e-3, gradients=True, error="", leaves_out=()):
    """``gradients``: those of the result are compared, too. ``error``: what it says if it raises.
    ``leaves_out``: columns of the table that the feature is not for."""

    def register(run):
        assert feature not in CHECKS, feature
        CHECKS[feature] = Check(run, networks, tolerance, gradients, error, leaves_out)
        return run

    return register


# Operators of the graphs that compilers made, in the outcome that is being found.
graph: list[str] = []


def is_ours(module):
    return not isinstance(module, nn.Module) or type(module).__module__ != reference.__name__


def note_graph(graph_module):
    graph.extend(str(n.target) for n in graph_module.graph.nodes if n.op == "call_function")


@contextmanager
def counted():
    """Counts the calls of fused chains."""
    kinds = (inference.Chain, training.Program, frozen.FrozenProgram)
    runs, originals = [], [kind.run for kind in kinds]

    def counting(original):
        def run(self, *args, **kwargs):
            runs.append(self)
            return original(self, *args, **kwargs)

        return run

    for kind, original in zip(kinds, originals, strict=True):
        kind.run = counting(original)
    try:
        yield runs
    finally:
        for kind, original in zip(kinds, originals, strict=True):
            kind.run = original


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value for t in tensors(part)]


def outcome(check, module, x):
    """What a check computes: results, gradients, statistics; or what it raises."""
    torch.manual_seed(1)
    try:
        found = check.run(module, x)
        if isinstance(found, tuple):
            found, module = found
        results = tensors(found)
        losses = [y for y in results if y.requires_grad] if check.gradients else []
        if losses:
            sum((y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in losses).backward()
    except Exception as error:  # which the outcome tells
        return error
    grads = [p.grad for p in module.parameters() if p.grad is not None] if losses else []
    return [t.detach().clone() for t in (*results, *grads, *module.buffers()) if not t.is_meta]


def assert_close(ours, theirs, tolerance):
    assert len(ours) == len(theirs) > 0
    scale = max((b.double().norm() for b in theirs), default=0)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm() + 1e-2 * tolerance * scale


def images():
    return torch.randn(2, 3, SIZE, SIZE)


def found_way(check, in_training):
    """The outcome for a network, after it was compared with its twin's."""
    torch.manual_seed(0)
    fast, eager = (m.train(in_training) for m in check.networks())
    x = images()
    theirs = outcome(check, eager, x.clone())
    backends.fallbacks(clear=True)
    graph.clear()
    with counted() as runs:
        ours = outcome(check, fast, x.clone())
    if isinstance(ours, Exception):
        assert check.error, ours
        assert re.search(check.error, str(ours)), ours
        as_eager = isinstance(theirs, Exception) and re.search(check.error, str(theirs))
        return "raises as eager" if as_eager else "raises"
    assert not isinstance(theirs, Exception), theirs
    assert_close(ours, theirs, check.tolerance)
    if graph:
        return "fused" if any("resnet_fast" in op for op in graph) else "unfused"
    assert runs or backends.fallbacks(), "nothing of the network ran"
    return "unfused" if backends.fallbacks() else "fused"


def fresh(module):
    return copy.deepcopy(module)

"""Batch norm as a call of ``F.batch_norm`` in a module's own ``forward``, as classes with an activation behind it have.

:mod:`.pattern` hands a traced graph in and gets the calls that compute what ``nn.BatchNorm2d`` would: the module is a
``nn.BatchNorm2d`` by its tensors and settings, the call takes these tensors and settings, and in training mode the code
counts batches. Frozen batch norms (:mod:`resnet_fast.chain.frozen_norm`) come along.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..chain.frozen_norm import find_frozen

__all__ = ["FunctionalNorm", "find_functional_norms", "vacuous_checks"]

_ARGUMENTS = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_DEFAULTS = dict(zip(_ARGUMENTS[3:], (None, None, False, 0.1, 1e-5), strict=True))


@dataclass(frozen=True)
class FunctionalNorm:
    """A batch norm that a module computes itself. aside: its nodes beside the one that ends it."""

    path: str
    module: nn.Module
    aside: frozenset[fx.Node]
    input: fx.Node
    frozen_eps: float | None = None  # of a frozen one


def find_functional_norms(root: nn.Module, graph: fx.Graph, training: bool) -> dict[fx.Node, FunctionalNorm]:
    """Calls of ``F.batch_norm`` that compute what ``nn.BatchNorm2d`` would in this mode, and frozen batch norms; by the
    node that ends them."""
    attributes = {str(n.target): n for n in graph.nodes if n.op == "get_attr"}
    found = ((n, _functional_norm(root, n, training, attributes)) for n in graph.nodes if n.target is F.batch_norm)
    norms = {n: norm for n, norm in found if norm is not None}
    for path, code in find_frozen(root, graph):
        aside = frozenset(code.aside | {*code.tensors.values()})
        norms[code.end] = FunctionalNorm(path, root.get_submodule(path), aside, code.input, code.eps)
    return norms


def _functional_norm(
    root: nn.Module, call: fx.Node, training: bool, attributes: dict[str, fx.Node]
) -> FunctionalNorm | None:
    given: dict[str, Any] = {**_DEFAULTS, **dict(zip(_ARGUMENTS, call.args, strict=False)), **call.kwargs}
    tensors = {name: given[name] for name in _ARGUMENTS[1:5] if given.get(name) is not None}
    if not all(isinstance(t, fx.Node) and t.op == "get_attr" and set(t.users) == {call} for t in tensors.values()):
        return None
    path = next((str(t.target).rpartition(".")[0] for t in tensors.values()), "")
    if not path or any(t.target != f"{path}.{name}" for name, t in tensors.items()):
        return None
    module = root.get_submodule(path)
    if not isinstance(module, nn.BatchNorm2d):
        return None
    tracked = not training or module.track_running_stats
    expected = [name for name in _ARGUMENTS[1:5] if getattr(module, name) is not None]
    expected = [name for name in expected if tracked or not name.startswith("running")]
    settings = (training or module.running_mean is None, module.eps)
    if list(tensors) != expected or (given["training"], given["eps"]) != settings:
        return None
    aside = set(tensors.values())
    counter = attributes.get(f"{path}.num_batches_tracked")
    if training:
        # Without a momentum, nn.BatchNorm2d averages over all batches, and would read the counter's value.
        if given["momentum"] != module.momentum or (counter is not None) != (
            module.track_running_stats and module.num_batches_tracked is not None
        ):
            return None
        if counter is not None:
            users = list(counter.users)
            if len(users) != 1 or users[0].target != "add_" or users[0].args != (counter, 1) or users[0].users:
                return None
            aside |= {counter, users[0]}
    return FunctionalNorm(path, module, frozenset(aside), given["input"])


def vacuous_checks(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """Nodes of ``torch._assert(value.ndim == 4, ...)``, by value; the message may contain ``value.ndim``.

    They always hold: fused modules take images alone, and convolutions return images.
    """
    found: dict[fx.Node, set[fx.Node]] = {}
    for n in graph.nodes:
        method = n.op == "call_method" and n.target in ("dim", "ndimension")
        if method or (n.target is getattr and n.args[1] == "ndim"):
            compared = set(n.users)
            checks = {check for equal in compared for check in equal.users}
            if all(e.target is operator.eq and e.args == (n, 4) and e.users for e in compared) and all(
                check.target is torch._assert and not check.users for check in checks
            ):
                found.setdefault(n.args[0], set()).update((n, *compared, *checks))
    return found

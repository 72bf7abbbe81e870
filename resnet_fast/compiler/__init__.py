"""``torch.compile(model, backend="resnet_fast")``: the chains that ``fuse`` finds, found in Dynamo's graph instead.

Dynamo traces whatever Python does around the layers and guards on what it asked for. The backend gets the graph of
PyTorch's calls that is left, and runs its chains of convolution, batch norm, sum and ReLU on the executor of fused
modules (:mod:`resnet_fast.chain.executor`), in eval and in training mode; the rest runs as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend

from .checkpoints import checkpointed, plain_checkpoint
from .graph import chains_of
from .rest import with_compiled_rest

__all__ = ["backend"]

_log = logging.getLogger(__name__)
# In the names that Dynamo gives to parameters and buffers among the inputs.
_OF_MODULES = ("_parameters_", "_buffers_")


def backend(
    graph_module: fx.GraphModule, inputs: Sequence[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """What ``torch.compile(model, backend="resnet_fast")`` calls for each graph that Dynamo traces.

    Equivalent to ``graph_module``, but for rounding, with gradients and running statistics. Which convolutions were
    fused, and why others were not, is logged: ``logging.getLogger("resnet_fast.compiler").setLevel("INFO")``.
    Runs that fall back are counted by :func:`resnet_fast.backends.fallbacks`.

    Args:
        graph_module: calls of PyTorch's operators; parameters and buffers are its inputs, or attributes.
        inputs: examples of its inputs.
        options: of ``torch.compile``: ``{"rest": name}`` has what is no chain compiled by another backend, in pieces
            between the chains; ``"inductor"``, say. ``"eager"``, which leaves it as it is, is the default.

    Returns:
        A function of the graph's inputs.

    Raises:
        ValueError: an option that there is none of.
        torch._dynamo.exc.InvalidBackend: ``rest`` is not the name of a backend.
    """
    rest = _rest(options or {})
    made, apart = _with_chains(graph_module, _lasting(graph_module, inputs))
    return (made if rest == "eager" else with_compiled_rest(made, apart, lookup_backend(rest))).forward


backend.finds_chains = True  # type: ignore[attr-defined]


def _rest(options: dict[str, Any]) -> str:
    wrong = next((name for name in options if name != "rest"), None)
    if wrong is not None:
        raise ValueError(f"options has {wrong!r}, want 'rest' alone")
    return options.get("rest", "eager")


def _with_chains(graph_module: fx.GraphModule, lasting: dict[fx.Node, Tensor]) -> tuple[fx.GraphModule, set[Any]]:
    """The graph with its chains, and the functions that it calls for them."""
    found = chains_of(graph_module.graph, lasting)
    if found.layers:
        _log.info("%s", found)
    made = fx.GraphModule(graph_module, found.graph)
    calls = {*found.calls}
    named = {n.name: t for n, t in lasting.items()}
    for call in made.graph.nodes:
        body = plain_checkpoint(made, call)
        if body is not None:
            operands = call.args[1:]
            values = [named.get(getattr(o, "name", "")) for o in operands]
            inside = zip(body.graph.find_nodes(op="placeholder"), values, strict=True)
            again, _ = _with_chains(body, {n: t for n, t in inside if t is not None})
            call.target = checkpointed(again.forward, [t is not None for t in values])
            call.args = operands
            calls.add(call.target)
    made.recompile()
    return made, calls


def _lasting(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> dict[fx.Node, Tensor]:
    """Tensors that last from call to call: parameters, buffers and attributes."""
    found: dict[fx.Node, Tensor] = {}
    given = iter(inputs)
    for n in graph_module.graph.nodes:
        value = next(given, None) if n.op == "placeholder" else None
        if n.op == "get_attr":
            value = getattr(graph_module, str(n.target), None)
        elif not isinstance(value, nn.Parameter) and not any(name in str(n.target) for name in _OF_MODULES):
            continue
        if isinstance(value, Tensor):
            found[n] = value
    return found

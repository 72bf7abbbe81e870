"""Traces ``forward`` by running it once on proxies (``torch.fx``): a module goes in, a :class:`Trace` comes out.

:class:`.partition.GraphPartitioner` calls it, for code alone that :mod:`.purity` has read: it computes the same at
every later call and leaves nothing behind. Code that asks for what a proxy does not know, values and shapes, raises
UntraceableError.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

__all__ = ["IN_PLACE", "Trace", "UntraceableError", "is_foreign", "trace_forward"]


class UntraceableError(Exception):
    """The forward of ``module`` cannot be traced, for that reason."""

    def __init__(self, module: nn.Module, why: str) -> None:
        super().__init__(why)
        self.module = module


class Trace:
    """The graph of one forward, and the modules inlined into it, by path (``""`` is the module itself).

    Inlined are those whose own code ran, and those that this code went through without a call, as lists of modules.
    """

    def __init__(self, graph: fx.Graph, inlined: list[str], owners: dict[fx.Node, str]) -> None:
        self.graph = graph
        self.inlined = inlined
        self.asked: dict[str, set[str]] = {}  # attributes that the code reads, by the path of the module
        self.owners = owners  # of each node, the innermost module whose code made it


def is_foreign(module: nn.Module) -> str | None:
    """Why the class's ``forward`` is not all that a call of the module does, or None."""
    kind = type(module)
    if "forward" in module.__dict__:
        return "a forward of its own"
    if isinstance(module, torch.jit.ScriptModule):
        return "a ScriptModule"
    if isinstance(module, fx.GraphModule):
        return "a graph of torch.fx"
    if kind.__call__ is not nn.Module.__call__:
        return "a __call__ of its own"
    # Wrappers (DDP, FSDP, averaged and quantised modules) act on more than their input. nn.Sequential does not.
    if kind.__module__.partition(".")[0] == "torch" and kind.forward is not nn.Sequential.forward:
        return f"a {kind.__name__}"
    return None


class _Proxy(fx.Proxy):
    """A proxy that tells ``a += b`` from ``a = a + b``, and tells ``isinstance`` that an argument is a tensor.

    Fused modules run unfused where an argument is something else. Of other values the type is not known.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        asking = sys._getframe(1)
        known = str(asking.f_globals.get("__name__")).partition(".")[0] in ("torch", "resnet_fast")
        if known or "isinstance" not in asking.f_code.co_names:  # functions written in C ask, too
            return _Proxy
        if self.node.op != "placeholder":
            raise fx.proxy.TraceError("it asks for the type of a value")
        return torch.Tensor


def _in_place(name: str) -> Callable[[_Proxy, Any], Any]:
    function = getattr(operator, name)

    def change(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return change


IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul")
for _name in IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    """Runs forwards without hooks, and notes whose code runs."""

    # Else code that changes a buffer would change it now, and a trace would hold for the value of a buffer alone.
    proxy_buffer_attributes = True

    def __init__(self, leaf: Callable[[nn.Module], bool], given: Collection[str]) -> None:
        super().__init__(autowrap_functions=())
        self.is_leaf, self.given = leaf, given
        self.running: list[tuple[nn.Module, str]] = []
        self.inlined: list[str] = []
        self.called: set[str] = set()
        self.owners: dict[fx.Node, str] = {}
        self.tensors: dict[int, str] | None = None  # of the root, by identity

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Proxies for parameters and buffers, found by identity: torch.fx searches all of them for each."""
        if not isinstance(attr_val, torch.Tensor):
            return attr_val
        if self.tensors is None:
            named = (*self.root.named_parameters(), *self.root.named_buffers())
            self.tensors = {id(t): name for name, t in reversed(named)}
        name = self.tensors.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Proxies for the arguments without a default and those in ``given``; the others keep their defaults."""
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        args: list[Any] = [self.root]
        for p in parameters:
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                continue
            if p.kind is p.KEYWORD_ONLY:
                if p.default is p.empty:
                    raise TypeError(f"the keyword argument {p.name!r} is wanted")
                continue
            wanted = p.default is p.empty or p.name in self.given
            args.append(self.create_proxy("placeholder", p.name, (), {}) if wanted else p.default)
        return root_fn, args

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        self.owners[node] = self.running[-1][1]
        return node

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        self.called.add(path)
        if self.is_leaf(m):
            return self.create_proxy("call_module", path, args, kwargs)
        with self.inside(m, path):
            return type(m).forward(m, *args, **kwargs)

    @contextmanager
    def inside(self, module: nn.Module, path: str) -> Iterator[None]:
        self.running.append((module, path))
        if path not in self.inlined:
            self.inlined.append(path)
        yield
        self.running.pop()  # not after an exception: it tells whose code raised

    def passed(self) -> list[str]:
        """Modules that the code may have gone through without a call: those around the called ones, and those without
        parameters that were not called, empty lists among them."""
        around = {""}
        for path in self.called:
            while "." in path:
                path = path.rpartition(".")[0]
                around.add(path)
        found, waiting = [], list(self.inlined)
        while waiting:
            above = waiting.pop(0)
            for name, child in self.root.get_submodule(above).named_children():
                path = f"{above}.{name}" if above else name
                if path not in self.called and (path in around or next(child.parameters(), None) is None):
                    found.append(path)
                    waiting.append(path)
        return found


@contextmanager
def _in_mode(root: nn.Module, training: bool) -> Iterator[None]:
    """Sets all modes to ``training``, and puts all attributes back afterwards."""
    modules = [
        m for m in root.modules() if not isinstance(m, torch.jit.ScriptModule)
    ]  # compiled: no attributes to put back
    before = [dict(vars(m)) for m in modules]
    tensors = [(t, t.detach(), t.requires_grad) for t in (*root.parameters(), *root.buffers())]
    for m in modules:
        m.__dict__["training"] = training
    try:
        yield
    finally:
        for m, attributes in zip(modules, before, strict=True):
            m.__dict__.clear()
            m.__dict__.update(attributes)
        for t, was, wanted in tensors:  # the code may call float() of a module where a tensor is usual
            if t.dtype != was.dtype or t.device != was.device:
                t.data = was
            if t.requires_grad != wanted:
                t.requires_grad_(wanted)


def trace_forward(
    module: nn.Module, training: bool, leaf: Callable[[nn.Module], bool], given: Collection[str] = ()
) -> Trace:
    """``module.forward`` in training or in eval mode; a module that is a ``leaf`` becomes one call.

    given: arguments that are tensors though they have a default.

    Raises:
        UntraceableError: it cannot be traced.
    """
    tracer = _Tracer(leaf, given)
    try:
        with _in_mode(module, training), torch.enable_grad(), tracer.inside(module, ""):
            graph = tracer.trace(module)
    except UntraceableError:
        raise
    except Exception as error:  # whatever the code does when it gets a proxy
        running = tracer.running[-1][0] if tracer.running else module
        why = str(error).strip().splitlines()
        raise UntraceableError(
            running, f"its forward cannot be traced: {why[0] if why else type(error).__name__}"
        ) from error
    return Trace(graph, tracer.inlined + tracer.passed(), tracer.owners)

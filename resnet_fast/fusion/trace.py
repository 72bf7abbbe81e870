"""What a module's ``forward`` computes, written down by running it once on symbols (``torch.fx``).

Only code runs that :mod:`.purity` has read: it finds what every later call finds, and leaves nothing behind.
Refused is what asks for something that a symbol does not know: values and shapes.
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

__all__ = ["IN_PLACE", "RefusedError", "Trace", "follow", "is_foreign"]


class RefusedError(Exception):
    """The forward of ``module`` cannot be written down, for that reason."""

    def __init__(self, module: nn.Module, why: str) -> None:
        super().__init__(why)
        self.module = module


class Trace:
    """The graph of one forward, and the modules that it read, by path (``""`` is the module itself).

    Read are those whose own code ran, and those that this code went through without a call, as lists of modules.
    """

    def __init__(self, graph: fx.Graph, opened: list[str], owners: dict[fx.Node, str]) -> None:
        self.graph = graph
        self.opened = opened
        self.asked: dict[str, set[str]] = {}  # attributes that the code asks for, by the path of the module
        self.owners = owners  # the innermost module whose code made the node


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


class _Symbol(fx.Proxy):
    """A symbol that tells ``a += b`` from ``a = a + b``, and ``isinstance`` what it stands for.

    Arguments are tensors: fused modules run unfused where one is something else. Of other values it is not known.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        asking = sys._getframe(1)
        known = str(asking.f_globals.get("__name__")).partition(".")[0] in ("torch", "resnet_fast")
        if known or "isinstance" not in asking.f_code.co_names:  # functions in C ask, too
            return _Symbol
        if self.node.op != "placeholder":
            raise fx.proxy.TraceError("it asks for the type of a value")
        return torch.Tensor


def _in_place(name: str) -> Callable[[_Symbol, Any], Any]:
    function = getattr(operator, name)

    def change(self: _Symbol, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return change


IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul")
for _name in IN_PLACE:
    setattr(_Symbol, f"__{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    """Runs forwards without hooks, and keeps an account of whose code is running."""

    # Otherwise code that changes a buffer would change it now, and code that asks for its value would be read for one.
    proxy_buffer_attributes = True

    def __init__(self, leaf: Callable[[nn.Module], bool], given: Collection[str]) -> None:
        super().__init__(autowrap_functions=())
        self.is_leaf, self.given = leaf, given
        self.running: list[tuple[nn.Module, str]] = []
        self.opened: list[str] = []
        self.called: set[str] = set()
        self.owners: dict[fx.Node, str] = {}
        self.tensors: dict[int, str] | None = None  # of the root, by identity

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Symbols for parameters and buffers. That of torch.fx looks through all of them for each."""
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
        return _Symbol(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Symbols for the arguments without a default and those that are given; the others keep their defaults."""
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
        if path not in self.opened:
            self.opened.append(path)
        yield
        self.running.pop()  # not after an exception: it tells whose code raised

    def passed(self) -> list[str]:
        """What the code may have gone through without a call: modules around those that were called, and modules
        without parameters that were not called, empty lists among them."""
        around = {""}
        for path in self.called:
            while "." in path:
                path = path.rpartition(".")[0]
                around.add(path)
        found, waiting = [], list(self.opened)
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
    """All flags at ``training``; attributes are put back whatever happens."""
    modules = [m for m in root.modules() if not isinstance(m, torch.jit.ScriptModule)]  # compiled: nothing to see
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
        for t, was, wanted in tensors:  # `float()` of a local name that holds a module, not a tensor
            if t.dtype != was.dtype or t.device != was.device:
                t.data = was
            if t.requires_grad != wanted:
                t.requires_grad_(wanted)


def follow(module: nn.Module, training: bool, leaf: Callable[[nn.Module], bool], given: Collection[str] = ()) -> Trace:
    """The graph of ``module.forward``, as in training or in eval mode; what ``leaf`` says is not looked into.

    given: arguments that are tensors though they have a default.

    Raises:
        RefusedError: it cannot be written down.
    """
    tracer = _Tracer(leaf, given)
    try:
        with _in_mode(module, training), torch.enable_grad(), tracer.inside(module, ""):
            graph = tracer.trace(module)
    except RefusedError:
        raise
    except Exception as error:  # whatever the code of others does when it gets a symbol
        running = tracer.running[-1][0] if tracer.running else module
        why = str(error).strip().splitlines()
        raise RefusedError(
            running, f"its forward cannot be traced: {why[0] if why else type(error).__name__}"
        ) from error
    return Trace(graph, tracer.opened + tracer.passed(), tracer.owners)

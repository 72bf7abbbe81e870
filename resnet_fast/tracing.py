"""What a module's ``forward`` computes, written down by running it once on symbols (``torch.fx``).

The run must find what every later call would find. So it is refused where the code asks for something that a symbol
does not know (values, shapes, types), draws random numbers, makes tensors, changes attributes, or enters a context
(no_grad, autocast, checkpointing); and whatever it changed is put back.
"""

from __future__ import annotations

import builtins
import inspect
import operator
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

__all__ = ["IN_PLACE", "RefusedError", "Trace", "follow", "is_foreign"]

_SAMPLE = torch.empty(0)


class RefusedError(Exception):
    """The forward of ``module`` cannot be written down, for that reason. ``effects``: it does more than compute."""

    def __init__(self, module: nn.Module, why: str, effects: bool = False) -> None:
        super().__init__(why)
        self.module = module
        self.effects = effects


class Trace:
    """The graph of one forward, and the modules that it read, by path (``""`` is the module itself).

    Read are those whose own code ran, and those that this code went through without a call, as lists of modules.
    """

    def __init__(self, graph: fx.Graph, opened: list[str], owners: dict[fx.Node, str]) -> None:
        self.graph = graph
        self.opened = opened
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


_is_grad_enabled = torch.is_grad_enabled


def _contexts() -> tuple[Any, ...]:
    return (
        _is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
    )


class _Symbol(fx.Proxy):
    """A symbol that tells ``a += b`` from ``a = a + b``."""


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

    def __init__(self, leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__(autowrap_functions=())
        self.is_leaf = leaf
        self.running: list[tuple[nn.Module, str]] = []
        self.opened: list[str] = []
        self.called: set[str] = set()
        self.owners: dict[fx.Node, str] = {}
        self.contexts = _contexts()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Symbol(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Symbols for the arguments without a default; the others keep theirs."""
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        args: list[Any] = [self.root]
        for p in parameters:
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                continue
            if p.kind is p.KEYWORD_ONLY:
                if p.default is p.empty:
                    raise TypeError(f"the keyword argument {p.name!r} is wanted")
                continue
            args.append(self.create_proxy("placeholder", p.name, (), {}) if p.default is p.empty else p.default)
        return root_fn, args

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if _contexts() != self.contexts:
            raise fx.proxy.TraceError("a context such as no_grad, autocast or checkpointing inside it")
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
        with _asked_for_types(type(module).forward):
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
def _asked_for_types(forward: Any) -> Iterator[None]:
    """``isinstance`` in the code of ``forward`` sees a symbol as what it stands for: its module gets one of its own.

    Calls pass on tensors only: fused modules run unfused where an argument is something else.
    """
    names = getattr(inspect.unwrap(forward), "__globals__", {})
    if "isinstance" in names:
        yield
        return

    def asked(value: Any, wanted: Any) -> bool:
        if builtins.isinstance(value, fx.Proxy):
            if value.node.op != "placeholder":
                raise fx.proxy.TraceError("it asks for the type of a value")
            return builtins.isinstance(_SAMPLE, wanted)
        return builtins.isinstance(value, wanted)

    names["isinstance"] = asked
    try:
        yield
    finally:
        del names["isinstance"]


def _asked_for_gradients() -> bool:
    if not str(sys._getframe(1).f_globals.get("__name__")).startswith("torch."):
        raise fx.proxy.TraceError("it asks whether gradients are recorded")
    return _is_grad_enabled()


@contextmanager
def _undisturbed(root: nn.Module, training: bool) -> Iterator[None]:
    """All flags at ``training``. Whatever the code inside changed in attributes is put back, and told of."""
    modules = [m for m in root.modules() if not isinstance(m, torch.jit.ScriptModule)]  # compiled: nothing to see
    before = [dict(m.__dict__) for m in modules]
    children = [dict(m._modules) for m in modules]
    plain = [
        t for attributes in before for t in attributes.values() if type(t) is torch.Tensor and not t.is_inference()
    ]
    contents = [(t, t._version, t.detach().clone()) for t in plain]  # parameters and buffers are symbols meanwhile
    random_states = (torch.random.get_rng_state(), random.getstate())
    changed = drawn = False
    for m in modules:
        m.__dict__["training"] = training
    torch.is_grad_enabled = _asked_for_gradients
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.is_grad_enabled = _is_grad_enabled
        if not torch.equal(torch.random.get_rng_state(), random_states[0]) or random.getstate() != random_states[1]:
            drawn = True
            torch.random.set_rng_state(random_states[0])
            random.setstate(random_states[1])
        for m, attributes, own in zip(modules, before, children, strict=True):
            now = {name: value for name, value in m.__dict__.items() if name != "training"}
            same = len(now) == len(attributes) - 1 and all(attributes.get(name, now) is v for name, v in now.items())
            if not same or list(m._modules.values()) != list(own.values()):
                changed = True
                m.__dict__.clear()
                m.__dict__.update(attributes)
                m._modules.clear()
                m._modules.update(own)
            m.__dict__["training"] = attributes["training"]
        for t, version, content in contents:
            if t._version != version:
                changed = True
                t.detach().copy_(content)
    if changed:
        raise RefusedError(root, "its forward changes attributes", effects=True)
    if drawn:
        raise RefusedError(root, "its forward draws random numbers", effects=True)


def follow(module: nn.Module, training: bool, leaf: Callable[[nn.Module], bool]) -> Trace:
    """The graph of ``module.forward``, as in training or in eval mode; what ``leaf`` says is not looked into.

    Raises:
        RefusedError: it cannot be written down, or only for this one call.
    """
    tracer = _Tracer(leaf)
    try:
        with _undisturbed(module, training), torch.autocast("cpu", enabled=False), tracer.inside(module, ""):
            tracer.contexts = _contexts()
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

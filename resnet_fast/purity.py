"""Whether the code of a ``forward`` is shown to be a function of its input, registered tensors and plain attributes.

Symbols go through the code once (:mod:`resnet_fast.tracing`), and what they met stands for every later call. So nothing
is allowed but what is known to be repeated that way. The code is read statement by statement, and what it gets from
outside - attributes of modules, global names, functions - is looked at as it is. Known are layers and lists of layers,
tensors of modules, constants, PyTorch's functions of tensors, and code of the same kind; all of it is watched later.
"""

from __future__ import annotations

import ast
import builtins
import enum
import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import patches
from .source import FunctionNode, source_of

__all__ = ["Purity", "purity"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, type(...))
_PLAIN_OF_TORCH = (torch.dtype, torch.device, torch.memory_format, torch.layout)
_BUILTINS = {
    *(abs, bool, dict, divmod, enumerate, float, int, isinstance, len, list, max, min, pow, range, reversed, round),
    *(set, slice, sum, tuple, zip, OrderedDict, torch.Size, map, filter, all, any, sorted),
}
# Of modules, what tells of their children.
_OF_MODULES = {"children", "named_children", "modules", "named_modules"}
# Answered the same at every call that runs fused.
_CONSTANT = {torch.jit.is_scripting, torch.jit.is_tracing}
_SAFE = {torch._assert, *_CONSTANT}
_OF_CHILDREN = {*_OF_MODULES, "values", "items"}
# Methods that change a list, a dict or a set; allowed of those that the code has made itself.
_CHANGES = {
    *("append", "extend", "insert", "pop", "popitem", "remove", "clear", "sort", "reverse"),
    *("update", "setdefault", "add_module", "register_module", "discard"),
}
_READS = {"get", "items", "keys", "values"}
_ITERATORS = {"enumerate", "reversed", "list", "tuple", "zip", "sorted", "iter", "next", "map", "filter"}
_OF_VALUES = {name for kind in (Tensor, list, dict, tuple, str) for name in dir(kind)}


class _ImpureError(Exception):
    """Why the code is not shown to be a function of what is known."""


_UNKNOWN = object()


@functools.cache
def _of_tensors() -> frozenset[Any]:
    """PyTorch's functions that symbols can stand in for: calls of them are repeated, whatever they do."""
    overrides = torch.overrides.get_testing_overrides()
    found = {f for f in overrides if not str(getattr(f, "__module__", "")).startswith("torch.distributed")}
    in_place = {getattr(torch, f"{getattr(f, '__name__', '')}_", None) for f in found}
    return frozenset(found | in_place - {None})


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def is_plain(value: Any) -> bool:
    """A constant: nobody can change it in place."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return isinstance(value, (*_PLAIN, *_PLAIN_OF_TORCH))


class _Reader:
    """Reads the code behind calls of ``root``; what it has read once, it does not read again."""

    def __init__(self, root: nn.Module, training: bool) -> None:
        self.root, self.training = root, training
        self.asked: dict[nn.Module, set[str]] = {}
        self.known: set[tuple[Any, int]] = set()
        self.stack: list[tuple[Any, int]] = []

    def read(
        self, function: Any, module: nn.Module | None, held: Mapping[str, Iterable[nn.Module]] | None = None
    ) -> None:
        """``function`` is called; module: what it is bound to; held: modules in its arguments, by their names."""
        if isinstance(function, functools.partial):
            for value in (*function.args, *function.keywords.values()):
                self.value(value, "an argument of a partial function")
            self.read(function.func, module)
            return
        if not isinstance(function, FunctionType) or str(function.__module__).partition(".")[0] == "torch":
            module_name, name = (getattr(function, part, "") for part in ("__module__", "__qualname__"))
            raise _ImpureError(f"it calls {module_name}.{name}")
        key = (function, id(module))
        if key in self.known and not held:
            return
        if len(self.stack) > 50:
            raise _ImpureError(f"{function.__qualname__} calls itself")
        self.known.add(key)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            if not is_plain(default):
                raise _ImpureError(f"{function.__qualname__} has a default that can change")
        node = source_of(function.__code__)
        if isinstance(node, str):
            raise _ImpureError(f"it runs {function.__qualname__}, {node}")
        self.stack.append(key)
        _Code(self, function, module, held or {}).all_of(node)
        self.stack.pop()

    def attribute(self, module: nn.Module, name: str) -> Any:
        """``module.name`` as it is now, which must be of a known kind."""
        self.asked.setdefault(module, set()).add(name)
        own = _in_classes(type(module), name)
        if isinstance(own, property):
            self.read(own.fget, module)
            return _UNKNOWN
        if name in vars(module):
            value = vars(module)[name]
            if getattr(value, "__self__", None) is module and isinstance(value, MethodType):
                self.read(value.__func__, module)
                return _UNKNOWN
            return self.value(value, f"{type(module).__name__}.{name}")
        for store in (module._modules, module._parameters, module._buffers):
            if name in store:
                return store[name] if store is module._modules else _UNKNOWN
        if own is _UNKNOWN:
            return _UNKNOWN  # the code raises when it comes here
        if isinstance(own, FunctionType):
            self.method(own, module)
            return _UNKNOWN
        if isinstance(own, (staticmethod, classmethod)):
            self.read(own.__func__, None)
            return _UNKNOWN
        return self.value(own, f"{type(module).__name__}.{name}")

    def method(self, function: FunctionType, module: nn.Module) -> None:
        """Of a class. Of PyTorch's, the code of layers is known; other methods of modules change them."""
        if function.__globals__.get("__name__") == nn.Module.__module__:
            raise _ImpureError(f"it asks for {type(module).__name__}.{function.__name__}")
        if not _written_by_pytorch(function):
            self.read(function, module)
        elif function.__name__ not in (*patches.called(type(module)), "keys", "items", "values"):
            raise _ImpureError(f"it asks for {type(module).__name__}.{function.__name__}")

    def value(self, value: Any, what: str) -> Any:
        """A value from outside: known, or refused. Functions among them are read."""
        if is_plain(value) or isinstance(value, ModuleType):
            return value
        if type(value) is dict and all(is_plain(v) for v in (*value, *value.values())):
            return _Dict(value)  # what is in it is watched
        if _hashable(value) and (value in _BUILTINS or value in _SAFE or value in _of_tensors()):
            return value
        if isinstance(value, (FunctionType, functools.partial)):
            self.read(value, None)
            return value
        if isinstance(value, BuiltinFunctionType) and value.__module__ in ("math", "_operator"):
            return value
        if callable(value) and not isinstance(value, nn.Module):
            raise _ImpureError(f"it calls {what}")
        raise _ImpureError(f"it reads {what}, a {type(value).__name__}")


def _in_classes(kind: type, name: str, behind: type | None = None) -> Any:
    """What the classes of ``kind`` have by that name; behind: only those that come after that one."""
    classes = kind.__mro__
    for c in classes[classes.index(behind) + 1 :] if behind is not None else classes:
        if name in vars(c):
            return vars(c)[name]
    return _UNKNOWN


class _Code:
    """The code of one function, bound to one module or to none."""

    def __init__(
        self,
        reader: _Reader,
        function: FunctionType,
        module: nn.Module | None,
        held: Mapping[str, Iterable[nn.Module]],
    ) -> None:
        """held: modules that the arguments may hold, by their names; of local names these are kept, too."""
        self.reader, self.function, self.module = reader, function, module
        code = function.__code__
        self.locals = {*code.co_varnames, *code.co_cellvars}
        self.self_name = code.co_varnames[0] if module is not None and code.co_argcount else None
        self.stored: set[str] = set()
        self.mixed: set[str] = set()  # local names that stand for something else than modules, too
        self.held: dict[str, dict[nn.Module, None]] = {name: dict.fromkeys(m) for name, m in held.items()}
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        self.closure = {name: cell.cell_contents for name, cell in cells if cell != CellType()}

    # Statements.

    def all_of(self, node: FunctionNode) -> None:
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        self.arguments = {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)} - names
        values: dict[str, list[ast.expr]] = {}
        for n in ast.walk(node):
            for target in n.targets if isinstance(n, ast.Assign) else []:
                if isinstance(target, ast.Name):
                    values.setdefault(target.id, []).append(n.value)
        self.fresh = {name for name, made in values.items() if all(map(_makes_a_container, made))} - self.arguments
        if isinstance(node, ast.Lambda):
            self.evaluate(node.body)
        else:
            self.statements(node.body)

    def statements(self, body: Iterable[ast.stmt]) -> None:
        for statement in body:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, (ast.Pass, ast.Raise, ast.Break, ast.Continue)):
            return  # what raises now is refused, and otherwise never comes here
        if isinstance(node, ast.If):
            test = self.evaluate(node.test)
            if test is _UNKNOWN or bool(test):
                self.statements(node.body)
            if test is _UNKNOWN or not test:
                self.statements(node.orelse)
        elif isinstance(node, (ast.Expr, ast.Return)):
            if node.value is not None:
                self.evaluate(node.value)
        elif isinstance(node, ast.Assign):
            self.evaluate(node.value)
            for target in node.targets:
                self.store(target, self.may_hold(node.value))
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
            if node.value is not None:
                self.evaluate(node.value)
                self.store(node.target, self.may_hold(node.value))
        elif isinstance(node, ast.Assert):
            self.evaluate(node.test)
        elif isinstance(node, ast.For):
            self.iterated(node.iter)
            self.store(node.target, self.may_hold(node.iter))
            for _ in range(2):  # names may stand for modules from the second time on
                self.statements([*node.body, *node.orelse])
        elif isinstance(node, ast.While):
            for _ in range(2):
                self.evaluate(node.test)
                self.statements([*node.body, *node.orelse])
        elif isinstance(node, ast.Delete) and all(isinstance(t, ast.Name) for t in node.targets):
            return
        else:
            raise _ImpureError(f"it has a statement '{_keyword(node)}'")

    def store(self, target: ast.expr, modules: Iterable[nn.Module] = ()) -> None:
        """modules: what may be in the value that is stored."""
        if isinstance(target, ast.Name):
            if target.id not in self.locals:
                raise _ImpureError(f"it sets the global name {target.id}")
            if target.id == self.self_name:
                raise _ImpureError(f"it sets {target.id}")
            modules = list(modules)
            self.hold(target.id, modules)
            if not modules:
                self.mixed.add(target.id)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for part in target.elts:
                self.store(part, modules)
        elif isinstance(target, ast.Starred):
            self.store(target.value, modules)
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
            # Such a name holds a list or dict that this code or its caller has made, or a tensor.
            name = target.value.id
            if name not in self.locals or name == self.self_name or self.held.get(name):
                raise _ImpureError(f"it changes {name}")
            self.evaluate(target.slice)
            self.hold(name, modules)
        else:
            raise _ImpureError(f"it sets {ast.unparse(target)}")

    def hold(self, name: str, modules: Iterable[nn.Module]) -> None:
        held = self.held.setdefault(name, {})
        held.update(dict.fromkeys(modules))
        held.update(dict.fromkeys(child for m in modules for child in m.children()))

    def may_hold(self, node: ast.expr | None) -> list[nn.Module]:
        """Modules that the value may be, contain or give when it is iterated; rather more than fewer."""
        if node is None:
            return []
        if isinstance(node, ast.Name) and node.id in self.held:
            return list(self.held[node.id])
        if isinstance(node, (ast.Name, ast.Attribute)):
            value = self.base(node)
            value = value.module if isinstance(value, _Children) else value
            found = [value] if isinstance(value, nn.Module) else []
            if value is _UNKNOWN and isinstance(node, ast.Attribute):
                below = (m._modules.get(node.attr) for m in self.may_hold(node.value))
                found = [m for m in below if m is not None]
            return [*found, *(child for m in found for child in m.children())]
        if isinstance(node, ast.Call):
            given: list[ast.expr] = []
            if isinstance(node.func, ast.Name) and node.func.id in _ITERATORS:
                given = node.args
            elif isinstance(node.func, ast.Attribute) and node.func.attr in _OF_CHILDREN:
                given = [node.func.value]
            return [m for part in given for m in self.may_hold(part)]
        if isinstance(node, (ast.BinOp, ast.Compare, ast.UnaryOp, ast.Constant)):
            return []
        parts = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr)]
        return [m for part in parts for m in self.may_hold(part)]

    def iterated(self, node: ast.expr) -> None:
        """A loop goes through it."""
        if isinstance(self.base(node), nn.Module):
            self.own_code(self.base(node), "__iter__")
        else:
            self.evaluate(node)

    def own_code(self, module: nn.Module, name: str) -> None:
        """Python calls the method by itself: it must be PyTorch's."""
        own = _in_classes(type(module), name)
        if own is not _UNKNOWN and not _written_by_pytorch(own):
            raise _ImpureError(f"{type(module).__name__} has a {name} of its own")

    # Expressions: the value where it is the same at every call, else _UNKNOWN.

    def evaluate(self, node: ast.expr | None) -> Any:
        if node is None:
            return _UNKNOWN
        value = self.base(node)
        if isinstance(value, (ModuleType, _Children, _Dict)):
            raise _ImpureError(f"it hands on {ast.unparse(node)}")
        if isinstance(value, nn.Module) and value is not self.module:
            for name in ("__iter__", "__len__", "__bool__", "__contains__"):
                self.own_code(value, name)
        return value

    def base(self, node: ast.expr) -> Any:
        """The same, where what can be changed in place is welcome, too: Python's modules, dicts of attributes."""
        if type(node) not in _EVALUATE:
            raise _ImpureError(f"it has an expression '{ast.unparse(node)}'")
        return _EVALUATE[type(node)](self, node)

    def constant(self, node: ast.Constant) -> Any:
        return node.value

    def name(self, node: ast.Name) -> Any:
        name = node.id
        if name == self.self_name:
            return self.module
        if name in self.closure and name not in self.stored:
            value, what = self.closure[name], f"the name {name}"
        elif name in self.locals or name in self.stored:
            return _UNKNOWN
        else:
            value = self.function.__globals__.get(name, getattr(builtins, name, _UNKNOWN))
            what = f"the global name {name}"
        if value is _UNKNOWN:
            return _UNKNOWN  # NameError
        return self.reader.value(value, what)

    def attribute(self, node: ast.Attribute) -> Any:
        base = self.base(node.value)
        if isinstance(base, nn.Module):
            return self.of_module(base, node.attr)
        if isinstance(base, ModuleType):
            value = vars(base).get(node.attr, _UNKNOWN)
            return value if value is _UNKNOWN else self.reader.value(value, f"{base.__name__}.{node.attr}")
        if isinstance(base, _Super):
            return base.attribute(node.attr)
        if isinstance(base, (_Children, _Dict)):
            if node.attr not in _READS:
                raise _ImpureError(f"it changes {ast.unparse(node.value)}")
            return _UNKNOWN
        if base is not _UNKNOWN:
            if isinstance(base, str) and node.attr.startswith("format"):
                raise _ImpureError("it formats values")
            return _UNKNOWN  # of a constant
        if node.attr in _CHANGES and getattr(node.value, "id", None) not in self.fresh:
            raise _ImpureError(f"it calls {ast.unparse(node)}")
        for module in self.may_hold(node.value):
            self.of_module(module, node.attr)
        return self.of_unknown(node.attr)

    def of_module(self, module: nn.Module, name: str) -> Any:
        if name in _OF_MODULES and _in_classes(type(module), name) is _in_classes(nn.Module, name):
            return _UNKNOWN
        if name == "_modules":
            return _Children(module)
        return self.reader.training if name == "training" else self.reader.attribute(module, name)

    def of_unknown(self, name: str) -> Any:
        """Of a tensor, a list, or a module of the network that a local name holds: of any of them that has it."""
        modules = list(self.reader.root.modules())
        holders = [m for m in modules if name in vars(m) or _of_own_class(m, name)]
        if not holders and name not in _OF_VALUES and name not in _OF_MODULES:
            stores = (store for m in modules for store in (m._modules, m._parameters, m._buffers))
            if not any(name in store for store in stores):
                raise _ImpureError(f"it asks for an attribute {name}")
        for m in holders:
            self.of_module(m, name)
        return _UNKNOWN

    def call(self, node: ast.Call) -> Any:
        if isinstance(node.func, ast.Name) and node.func.id not in self.locals:
            special = {"super": self.super, "isinstance": self.asked_for_type, "getattr": self.got, "hasattr": self.got}
            if node.func.id in special and node.func.id not in self.function.__globals__:
                return special[node.func.id](node)
        function = self.evaluate(node.func)
        if function is torch._assert:  # what it says of symbols nobody reads
            return self.evaluate(node.args[0])
        parts = [*node.args, *(keyword.value for keyword in node.keywords)]
        for part in parts:
            self.evaluate(part)
        modules = [self.may_hold(part) for part in parts]
        if any(modules) and not (_hashable(function) and function in _BUILTINS):
            self.hand_on(node, function, modules)
        return False if _hashable(function) and function in _CONSTANT else _UNKNOWN

    def hand_on(self, node: ast.Call, function: Any, modules: list[list[nn.Module]]) -> None:
        """Modules are among the arguments: the code that gets them is read once more."""
        plain = not node.keywords and not any(isinstance(a, ast.Starred) for a in node.args)
        if not isinstance(function, FunctionType) or not plain or len(modules) > function.__code__.co_argcount:
            raise _ImpureError(f"it hands modules on: {ast.unparse(node)}")
        self.reader.read(function, None, dict(zip(function.__code__.co_varnames, modules, strict=False)))

    def super(self, node: ast.Call) -> Any:
        """``super()``, or as it was once written, with the class and the module."""
        owner = self.type_of(node.args[0]) if node.args else self.closure.get("__class__")
        if self.module is None or not isinstance(owner, type) or owner not in type(self.module).__mro__:
            raise _ImpureError("it calls super() of something else")
        return _Super(self.reader, self.module, owner)

    def asked_for_type(self, node: ast.Call) -> Any:
        """The type of a layer is watched; that of an argument is a tensor's, or nothing runs fused."""
        value, kinds = node.args
        wanted = [self.type_of(k) for k in (kinds.elts if isinstance(kinds, ast.Tuple) else [kinds])]
        module = self.evaluate(value)
        if isinstance(module, nn.Module):
            return isinstance(module, tuple(wanted))
        of_argument = isinstance(value, ast.Name) and value.id in self.arguments and not self.held.get(value.id)
        if not of_argument or not all(k in (Tensor, list, tuple, dict, str, int, float, bool) for k in wanted):
            raise _ImpureError(f"it asks for {ast.unparse(node)}")
        return _UNKNOWN

    def type_of(self, node: ast.expr) -> type:
        """A class by its name, which may not be called."""
        value: Any = _UNKNOWN
        if isinstance(node, ast.Name) and node.id not in self.locals:
            value = self.closure.get(node.id, self.function.__globals__.get(node.id, getattr(builtins, node.id, None)))
        elif isinstance(node, ast.Attribute):
            base = self.base(node.value)
            value = vars(base).get(node.attr) if isinstance(base, ModuleType) else None
        if not isinstance(value, type):
            raise _ImpureError(f"it asks for a type by {ast.unparse(node)}")
        return value

    def got(self, node: ast.Call) -> Any:
        """``getattr`` and ``hasattr`` of a module, by a name that is known."""
        owner, name = node.args[0], self.evaluate(node.args[1])
        module = self.evaluate(owner)
        modules = [module] if isinstance(module, nn.Module) else self.may_hold(owner)
        known = isinstance(owner, ast.Name) and owner.id not in self.mixed
        if not modules or (not known and modules != [module]) or not isinstance(name, str):
            raise _ImpureError(f"it calls {ast.unparse(node)}")
        for default in node.args[2:]:
            self.evaluate(default)
        values = [self.of_module(m, name) for m in modules]
        if len(modules) > 1 or len(node.args) > 2:
            return _UNKNOWN
        return hasattr(modules[0], name) if ast.unparse(node.func) == "hasattr" else values[0]

    def compare(self, node: ast.Compare) -> Any:
        membership = isinstance(node.ops[0], (ast.In, ast.NotIn))
        right = [self.base(v) if membership else self.evaluate(v) for v in node.comparators]
        values = [self.evaluate(node.left), *(v.value if isinstance(v, _Dict) else v for v in right)]
        if any(isinstance(v, (_Children, ModuleType, nn.Module)) for v in right) and membership:
            return _UNKNOWN
        if len(values) != 2 or any(v is _UNKNOWN for v in values):
            return _UNKNOWN
        try:
            return _COMPARE[type(node.ops[0])](*values)
        except (KeyError, TypeError):
            return _UNKNOWN

    def bool_op(self, node: ast.BoolOp) -> Any:
        stops = isinstance(node.op, ast.Or)  # at the first that is true
        value: Any = _UNKNOWN
        unknown = False
        for part in node.values:
            value = self.evaluate(part)
            unknown = unknown or value is _UNKNOWN
            if value is not _UNKNOWN and bool(value) is stops:
                return _UNKNOWN if unknown else value
        return _UNKNOWN if unknown else value

    def unary_op(self, node: ast.UnaryOp) -> Any:
        value = self.evaluate(node.operand)
        return not value if isinstance(node.op, ast.Not) and value is not _UNKNOWN else _UNKNOWN

    def if_exp(self, node: ast.IfExp) -> Any:
        test = self.evaluate(node.test)
        if test is not _UNKNOWN:
            return self.evaluate(node.body if test else node.orelse)
        self.evaluate(node.body)
        self.evaluate(node.orelse)
        return _UNKNOWN

    def named_expr(self, node: ast.NamedExpr) -> Any:
        self.store(node.target, self.may_hold(node.value))
        return self.evaluate(node.value)

    def subscript(self, node: ast.Subscript) -> Any:
        value, index = self.base(node.value), self.evaluate(node.slice)
        if isinstance(value, _Dict):
            return value.value.get(index, _UNKNOWN) if is_plain(index) else _UNKNOWN
        if isinstance(value, _Children):
            value = value.module
        if isinstance(value, nn.Module):
            if type(value) not in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
                raise _ImpureError(f"it asks for an item of a {type(value).__name__}")
            try:
                return value[index] if isinstance(index, (int, str)) else _UNKNOWN  # type: ignore[index]
            except (IndexError, KeyError):
                return _UNKNOWN
        return _UNKNOWN

    def parts(self, node: ast.expr) -> Any:
        """Whose value is made of those of its parts."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and isinstance(node.left, ast.Constant):
            raise _ImpureError("it formats values")
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.expr):
                self.evaluate(part)
        return _UNKNOWN

    def comprehension(self, node: Any) -> Any:
        for generator in node.generators:
            self.iterated(generator.iter)
            for name in (n.id for n in ast.walk(generator.target) if isinstance(n, ast.Name)):
                self.hold(name, self.may_hold(generator.iter))
            self.stored |= {n.id for n in ast.walk(generator.target) if isinstance(n, ast.Name)}
            for condition in generator.ifs:
                self.evaluate(condition)
        for part in ("elt", "key", "value"):
            if hasattr(node, part):
                self.evaluate(getattr(node, part))
        return _UNKNOWN


_EVALUATE: dict[type[ast.expr], Callable[[_Code, Any], Any]] = {
    ast.Constant: _Code.constant,
    ast.Name: _Code.name,
    ast.Attribute: _Code.attribute,
    ast.Call: _Code.call,
    ast.Compare: _Code.compare,
    ast.BoolOp: _Code.bool_op,
    ast.UnaryOp: _Code.unary_op,
    ast.IfExp: _Code.if_exp,
    ast.NamedExpr: _Code.named_expr,
    ast.Subscript: _Code.subscript,
    **dict.fromkeys((ast.BinOp, ast.Tuple, ast.List, ast.Dict, ast.Set, ast.Starred, ast.Slice), _Code.parts),
    **dict.fromkeys((ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp), _Code.comprehension),
}


class _Children(NamedTuple):
    """The dict of a module's children."""

    module: nn.Module


class _Dict(NamedTuple):
    """A dict of constants, which is watched."""

    value: dict[Any, Any]


class _Super:
    """``super()`` in a method of ``owner``."""

    def __init__(self, reader: _Reader, module: nn.Module, owner: type) -> None:
        self.reader, self.module, self.owner = reader, module, owner

    def attribute(self, name: str) -> Any:
        value = _in_classes(type(self.module), name, self.owner)
        if isinstance(value, FunctionType):
            self.reader.method(value, self.module)
            return _UNKNOWN
        return self.reader.value(value, f"super().{name}")


_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def _makes_a_container(node: ast.expr) -> bool:
    named = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("list", "dict", "OrderedDict", "set")
    return named or isinstance(node, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp))


def _keyword(node: ast.stmt) -> str:
    return ast.unparse(node).split(maxsplit=1)[0].rstrip(":")


def _of_own_class(module: nn.Module, name: str) -> bool:
    """Whether a class that is not PyTorch's gives it the attribute."""
    return any(
        name in vars(c) for c in type(module).__mro__ if not str(c.__module__).startswith(("torch.", "builtins"))
    )


def _written_by_pytorch(function: Any) -> bool:
    """The forward of a layer or container of PyTorch's."""
    return str(getattr(function, "__module__", "")).startswith("torch.nn.modules.")


class Purity(NamedTuple):
    """reason: why a forward is not shown to be pure, or None. asked: what it asks modules for, itself among them."""

    reason: str | None
    asked: dict[nn.Module, set[str]]


def purity(module: nn.Module, training: bool) -> Purity:
    """Of the ``forward`` of the module's class in that mode.

    What it calls of its children is their own affair; their attributes that it asks for are not.
    """
    kind: Any = vars(type(module)).get("fused_from", type(module))
    for name in ("__getattr__", "__getattribute__"):
        if _in_classes(kind, name) not in (_in_classes(nn.Module, name), _in_classes(object, name)):
            return Purity(f"it has a {name} of its own", {})
    reader = _Reader(module, training)
    try:
        if not _written_by_pytorch(kind.forward):
            reader.read(kind.forward, module)
    except _ImpureError as error:
        return Purity(str(error), {})
    return Purity(None, reader.asked)

"""The expressions of a function: what each may be, and its value where that is the same at every call, else UNKNOWN.

:mod:`.statements` hands syntax trees in. Names come from the :class:`.scope.Scope`, what lies outside of the function
from the :class:`.values.ValueChecker`. What is not known to be harmless raises ImpureError.
"""

from __future__ import annotations

import ast
import builtins
import operator
from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .allowlist import (
    BUILTINS,
    FALSE_WHEN_FUSED,
    UNKNOWN,
    Children,
    ConstantDict,
    ImpureError,
    class_attribute,
    is_constant,
    is_hashable,
    is_layer_code,
)
from .scope import Scope
from .values import OF_MODULES, SuperProxy, ValueChecker

__all__ = ["ExpressionReader"]

_OF_CHILDREN = {*OF_MODULES, "values", "items"}
# Methods that change a list, a dict or a set; allowed on containers that the code has made itself.
_MUTATORS = {
    *("append", "extend", "insert", "pop", "popitem", "remove", "clear", "sort", "reverse"),
    *("update", "setdefault", "add_module", "register_module", "discard"),
}
_DICT_READS = {"get", "items", "keys", "values"}
# They give pairs of a name or a number and a module.
_PAIRS = {"items", "named_children", "named_modules", "enumerate"}
_ITERATORS = {"enumerate", "reversed", "list", "tuple", "zip", "sorted", "iter", "next", "map", "filter"}
_ARGUMENT_TYPES = (Tensor, list, tuple, dict, str, int, float, bool)


class ExpressionReader:
    """Reads expressions in one scope."""

    def __init__(self, values: ValueChecker, scope: Scope) -> None:
        self.values, self.scope = values, scope

    def evaluate(self, node: ast.expr | None) -> Any:
        """The value; code that gets hold of what can be changed in place is refused."""
        if node is None:
            return UNKNOWN
        value = self._base(node)
        if isinstance(value, (ModuleType, Children, ConstantDict)):
            raise ImpureError(f"it hands on {ast.unparse(node)}")
        if isinstance(value, nn.Module) and value is not self.scope.module:
            for name in ("__iter__", "__len__", "__bool__", "__contains__"):
                _check_own_method(value, name)
        return value

    def _base(self, node: ast.expr) -> Any:
        """The same where only a part of the value is wanted: Python's modules and watched dicts are allowed."""
        if type(node) not in _READERS:
            raise ImpureError(f"it has an expression '{ast.unparse(node)}'")
        return _READERS[type(node)](self, node)

    # Which modules a value may hold, and assignments that pass them on.

    def modules_in(self, node: ast.expr | None) -> list[nn.Module]:
        """Modules that the value may be, contain or give when it is iterated; rather more than fewer."""
        if node is None:
            return []
        if isinstance(node, ast.Name) and node.id in self.scope.modules_in:
            return list(self.scope.modules_in[node.id])
        if isinstance(node, (ast.Name, ast.Attribute)):
            value = self._base(node)
            value = value.module if isinstance(value, Children) else value
            found = [value] if isinstance(value, nn.Module) else []
            if value is UNKNOWN and isinstance(node, ast.Attribute):
                children = (m._modules.get(node.attr) for m in self.modules_in(node.value))
                found = [m for m in children if m is not None]
            return [*found, *(child for m in found for child in m.children())]
        if isinstance(node, ast.Call):
            parts: list[ast.expr] = []
            if isinstance(node.func, ast.Name) and node.func.id in _ITERATORS:
                parts = node.args
            elif isinstance(node.func, ast.Attribute) and node.func.attr in _OF_CHILDREN:
                parts = [node.func.value]
        elif isinstance(node, (ast.BinOp, ast.Compare, ast.UnaryOp, ast.Constant)):
            return []
        else:
            parts = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr)]
        return [m for part in parts for m in self.modules_in(part)]

    def assign(self, target: ast.expr, modules: Iterable[nn.Module] = ()) -> None:
        """``target = value``, where the value may hold ``modules``."""
        scope = self.scope
        if isinstance(target, ast.Name):
            if target.id not in scope.locals:
                raise ImpureError(f"it sets the global name {target.id}")
            if target.id == scope.self_name:
                raise ImpureError(f"it sets {target.id}")
            scope.assign(target.id, modules)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for part in target.elts:
                self.assign(part, modules)
        elif isinstance(target, ast.Starred):
            self.assign(target.value, modules)
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
            # Such a name holds a list or dict that this code or its caller has made, or a tensor.
            name = target.value.id
            if name not in scope.locals or name == scope.self_name or scope.modules_in.get(name):
                raise ImpureError(f"it changes {name}")
            self.evaluate(target.slice)
            scope.bind(name, modules)
        else:
            raise ImpureError(f"it sets {ast.unparse(target)}")

    def loop(self, target: ast.expr, node: ast.expr) -> None:
        """``for target in node``"""
        base = self._base(node)
        if isinstance(base, nn.Module):
            _check_own_method(base, "__iter__")
        else:
            self.evaluate(node)
        modules = self.modules_in(node)
        function = node.func if isinstance(node, ast.Call) else None
        pairs = getattr(function, "attr", getattr(function, "id", None)) in _PAIRS
        if pairs and isinstance(target, ast.Tuple) and len(target.elts) == 2:
            self.assign(target.elts[0])
            target = target.elts[1]
        self.assign(target, modules)

    # One method for each kind of expression: see _READERS.

    def _constant(self, node: ast.Constant) -> Any:
        return node.value

    def _name(self, node: ast.Name) -> Any:
        if node.id == self.scope.self_name:
            return self.scope.module
        value, what = self.scope.look_up(node.id)
        return UNKNOWN if value is UNKNOWN else self.values.value(value, what)

    def _attribute(self, node: ast.Attribute) -> Any:
        base = self._base(node.value)
        if isinstance(base, nn.Module):
            return self.values.attribute(base, node.attr)
        if isinstance(base, ModuleType):
            if node.attr not in vars(base):  # some are loaded when they are asked for
                raise ImpureError(f"it asks for {base.__name__}.{node.attr}")
            return self.values.value(vars(base)[node.attr], f"{base.__name__}.{node.attr}")
        if isinstance(base, SuperProxy):
            return base.attribute(node.attr)
        if isinstance(base, (Children, ConstantDict)):
            if node.attr not in _DICT_READS:
                raise ImpureError(f"it changes {ast.unparse(node.value)}")
            return UNKNOWN
        if base is not UNKNOWN:  # a constant
            if isinstance(base, str) and node.attr.startswith("format"):
                raise ImpureError("it formats values")
            return UNKNOWN
        if node.attr in _MUTATORS and getattr(node.value, "id", None) not in self.scope.own_containers:
            raise ImpureError(f"it calls {ast.unparse(node)}")
        modules = self.modules_in(node.value)
        for module in modules:
            self.values.attribute(module, node.attr)
        only = modules and isinstance(node.value, ast.Name) and node.value.id not in self.scope.not_only_modules
        return UNKNOWN if only else self.values.attribute_of_unknown(node.attr)

    def _call(self, node: ast.Call) -> Any:
        if isinstance(node.func, ast.Name) and node.func.id not in self.scope.locals:
            special = {"super": self._super, "isinstance": self._isinstance}
            special |= dict.fromkeys(("getattr", "hasattr"), self._getattr)
            if node.func.id in special and node.func.id not in self.scope.globals:
                return special[node.func.id](node)
        function = self.evaluate(node.func)
        if function is torch._assert:  # nobody reads its message about proxies
            return self.evaluate(node.args[0])
        parts = [*node.args, *(keyword.value for keyword in node.keywords)]
        for part in parts:
            self.evaluate(part)
        modules = [self.modules_in(part) for part in parts]
        if any(modules) and not (is_hashable(function) and function in BUILTINS):
            self._pass_modules(node, function, modules)
        return False if is_hashable(function) and function in FALSE_WHEN_FUSED else UNKNOWN

    def _pass_modules(self, node: ast.Call, function: Any, modules: list[list[nn.Module]]) -> None:
        """Modules are among the arguments: the code of ``function`` is read with them."""
        positional = not node.keywords and not any(isinstance(a, ast.Starred) for a in node.args)
        if not isinstance(function, FunctionType) or not positional or len(modules) > function.__code__.co_argcount:
            raise ImpureError(f"it hands modules on: {ast.unparse(node)}")
        self.values.read(function, None, dict(zip(function.__code__.co_varnames, modules, strict=False)))

    def _super(self, node: ast.Call) -> Any:
        """``super()`` or ``super(owner, self)``"""
        owner = self._type(node.args[0]) if node.args else self.scope.closure.get("__class__")
        module = self.scope.module
        if module is None or not isinstance(owner, type) or owner not in type(module).__mro__:
            raise ImpureError("it calls super() of something else")
        return SuperProxy(self.values, module, owner)

    def _isinstance(self, node: ast.Call) -> Any:
        """The type of a layer is watched; an argument is a tensor, or nothing runs fused."""
        value, kinds = node.args
        wanted = [self._type(k) for k in (kinds.elts if isinstance(kinds, ast.Tuple) else [kinds])]
        module = self.evaluate(value)
        modules = self.modules_in(value)
        for m in modules:
            self.values.asked.setdefault(m, set()).add("__class__")
        if isinstance(module, nn.Module):
            return isinstance(module, tuple(wanted))
        name, scope = value.id if isinstance(value, ast.Name) else None, self.scope
        if modules and name is not None and name not in scope.not_only_modules:
            return UNKNOWN
        of_argument = name in scope.arguments and not scope.modules_in.get(str(name))
        if not of_argument or not all(k in _ARGUMENT_TYPES for k in wanted):
            raise ImpureError(f"it asks for {ast.unparse(node)}")
        return UNKNOWN

    def _type(self, node: ast.expr) -> type:
        """A class by its name; the code need not be allowed to call it."""
        value: Any = UNKNOWN
        scope = self.scope
        if isinstance(node, ast.Name) and node.id not in scope.locals:
            value = scope.closure.get(node.id, scope.globals.get(node.id, getattr(builtins, node.id, None)))
        elif isinstance(node, ast.Attribute):
            base = self._base(node.value)
            value = vars(base).get(node.attr) if isinstance(base, ModuleType) else None
        if not isinstance(value, type):
            raise ImpureError(f"it asks for a type by {ast.unparse(node)}")
        return value

    def _getattr(self, node: ast.Call) -> Any:
        """``getattr`` and ``hasattr`` of a module, by a name that is known."""
        owner, name = node.args[0], self.evaluate(node.args[1])
        module = self.evaluate(owner)
        modules = [module] if isinstance(module, nn.Module) else self.modules_in(owner)
        only = isinstance(owner, ast.Name) and owner.id not in self.scope.not_only_modules
        if not modules or (not only and modules != [module]) or not isinstance(name, str):
            raise ImpureError(f"it calls {ast.unparse(node)}")
        for default in node.args[2:]:
            self.evaluate(default)
        found = [self.values.attribute(m, name) for m in modules]
        if ast.unparse(node.func) == "hasattr":
            there = {hasattr(m, name) for m in modules}
            return there.pop() if len(there) == 1 else UNKNOWN
        return found[0] if len(modules) == 1 and len(node.args) == 2 else UNKNOWN

    def _compare(self, node: ast.Compare) -> Any:
        membership = isinstance(node.ops[0], (ast.In, ast.NotIn))
        with_none = any(isinstance(v, ast.Constant) and v.value is None for v in (node.left, *node.comparators))
        compared = [node.left] if membership else [node.left, *node.comparators]
        if not with_none and any(map(self.modules_in, compared)):
            raise ImpureError(f"it compares layers: {ast.unparse(node)}")
        right = [self._base(v) if membership else self.evaluate(v) for v in node.comparators]
        values = [self.evaluate(node.left), *(v.value if isinstance(v, ConstantDict) else v for v in right)]
        if any(isinstance(v, (Children, ModuleType, nn.Module)) for v in right) and membership:
            return UNKNOWN
        if len(values) != 2 or any(v is UNKNOWN for v in values):
            return UNKNOWN
        try:
            return _COMPARE[type(node.ops[0])](*values)
        except (KeyError, TypeError):
            return UNKNOWN

    def _bool_op(self, node: ast.BoolOp) -> Any:
        stops = isinstance(node.op, ast.Or)  # at the first that is true
        value: Any = UNKNOWN
        unknown = False
        for part in node.values:
            value = self.evaluate(part)
            unknown = unknown or value is UNKNOWN
            if value is not UNKNOWN and bool(value) is stops:
                return UNKNOWN if unknown else value
        return UNKNOWN if unknown else value

    def _unary_op(self, node: ast.UnaryOp) -> Any:
        value = self.evaluate(node.operand)
        return not value if isinstance(node.op, ast.Not) and value is not UNKNOWN else UNKNOWN

    def _if_exp(self, node: ast.IfExp) -> Any:
        test = self.evaluate(node.test)
        if test is not UNKNOWN:
            return self.evaluate(node.body if test else node.orelse)
        self.evaluate(node.body)
        self.evaluate(node.orelse)
        return UNKNOWN

    def _named_expr(self, node: ast.NamedExpr) -> Any:
        self.assign(node.target, self.modules_in(node.value))
        return self.evaluate(node.value)

    def _subscript(self, node: ast.Subscript) -> Any:
        value, index = self._base(node.value), self.evaluate(node.slice)
        if isinstance(value, ConstantDict):
            return value.value.get(index, UNKNOWN) if is_constant(index) else UNKNOWN
        if isinstance(value, Children):
            value = value.module
        if isinstance(value, nn.Module):
            if type(value) not in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
                raise ImpureError(f"it asks for an item of a {type(value).__name__}")
            try:
                return value[index] if isinstance(index, (int, str)) else UNKNOWN  # type: ignore[index]
            except (IndexError, KeyError):
                return UNKNOWN
        return UNKNOWN

    def _parts(self, node: ast.expr) -> Any:
        """An expression whose value is made of those of its parts."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and isinstance(node.left, ast.Constant):
            raise ImpureError("it formats values")
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.expr):
                self.evaluate(part)
        return UNKNOWN

    def _comprehension(self, node: Any) -> Any:
        for generator in node.generators:
            names = {n.id for n in ast.walk(generator.target) if isinstance(n, ast.Name)}
            self.scope.locals |= names
            self.loop(generator.target, generator.iter)
            self.scope.loop_names |= names
            for condition in generator.ifs:
                self.evaluate(condition)
        for part in ("elt", "key", "value"):
            if hasattr(node, part):
                self.evaluate(getattr(node, part))
        return UNKNOWN


def _check_own_method(module: nn.Module, name: str) -> None:
    """Python calls the method by itself: it must be PyTorch's."""
    own = class_attribute(type(module), name)
    if own is not UNKNOWN and not is_layer_code(own):
        raise ImpureError(f"{type(module).__name__} has a {name} of its own")


_READERS: dict[type[ast.expr], Callable[[ExpressionReader, Any], Any]] = {
    ast.Constant: ExpressionReader._constant,
    ast.Name: ExpressionReader._name,
    ast.Attribute: ExpressionReader._attribute,
    ast.Call: ExpressionReader._call,
    ast.Compare: ExpressionReader._compare,
    ast.BoolOp: ExpressionReader._bool_op,
    ast.UnaryOp: ExpressionReader._unary_op,
    ast.IfExp: ExpressionReader._if_exp,
    ast.NamedExpr: ExpressionReader._named_expr,
    ast.Subscript: ExpressionReader._subscript,
    **dict.fromkeys(
        (ast.BinOp, ast.Tuple, ast.List, ast.Dict, ast.Set, ast.Starred, ast.Slice), ExpressionReader._parts
    ),
    **dict.fromkeys((ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp), ExpressionReader._comprehension),
}
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

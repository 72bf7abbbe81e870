"""The code of a function, read statement by statement: what it may do and what its expressions may be.

The value of an expression is found where it is the same at every call, as that of an attribute that is watched;
branches that are not taken are not read. What is not known to be harmless raises ImpureError.
"""

from __future__ import annotations

import ast
import builtins
import operator
from collections.abc import Callable, Iterable, Mapping
from types import CellType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .known import (
    BUILTINS,
    CONSTANT,
    UNKNOWN,
    Children,
    Constants,
    ImpureError,
    in_classes,
    is_hashable,
    is_layer_code,
    is_plain,
)
from .source import FunctionNode

if TYPE_CHECKING:
    from .purity import Reader

__all__ = ["Code"]

# Of modules, what tells of their children.
_OF_MODULES = {"children", "named_children", "modules", "named_modules"}
_OF_CHILDREN = {*_OF_MODULES, "values", "items"}
# Methods that change a list, a dict or a set; allowed of those that the code has made itself.
_CHANGES = {
    *("append", "extend", "insert", "pop", "popitem", "remove", "clear", "sort", "reverse"),
    *("update", "setdefault", "add_module", "register_module", "discard"),
}
# They give pairs of a name or a number and what it stands for.
_NUMBERED = {"items", "named_children", "named_modules", "enumerate"}
_READS = {"get", "items", "keys", "values"}
_ITERATORS = {"enumerate", "reversed", "list", "tuple", "zip", "sorted", "iter", "next", "map", "filter"}
_OF_VALUES = {name for kind in (Tensor, list, dict, tuple, str) for name in dir(kind)}


class Code:
    """The code of one function, bound to one module or to none."""

    def __init__(
        self,
        reader: Reader,
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
        self.arguments = {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)}  # that are what they were
        values: dict[str, list[ast.expr]] = {}
        for n in ast.walk(node):
            if isinstance(n, ast.Assign):
                for target in n.targets:
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
            if test is UNKNOWN or bool(test):
                self.statements(node.body)
            if test is UNKNOWN or not test:
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
            self.loop(node.target, node.iter)
            for _ in range(2):  # names may stand for modules from the second time on
                self.statements([*node.body, *node.orelse])
        elif isinstance(node, ast.While):
            for _ in range(2):
                self.evaluate(node.test)
                self.statements([*node.body, *node.orelse])
        elif isinstance(node, ast.Delete) and all(isinstance(t, ast.Name) for t in node.targets):
            return
        else:
            raise ImpureError(f"it has a statement '{_keyword(node)}'")

    def store(self, target: ast.expr, modules: Iterable[nn.Module] = ()) -> None:
        """modules: what may be in the value that is stored."""
        if isinstance(target, ast.Name):
            if target.id not in self.locals:
                raise ImpureError(f"it sets the global name {target.id}")
            if target.id == self.self_name:
                raise ImpureError(f"it sets {target.id}")
            modules = list(modules)
            self.arguments.discard(target.id)
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
                raise ImpureError(f"it changes {name}")
            self.evaluate(target.slice)
            self.hold(name, modules)
        else:
            raise ImpureError(f"it sets {ast.unparse(target)}")

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
            value = value.module if isinstance(value, Children) else value
            found = [value] if isinstance(value, nn.Module) else []
            if value is UNKNOWN and isinstance(node, ast.Attribute):
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

    def loop(self, target: ast.expr, node: ast.expr) -> None:
        """``for target in node``"""
        if isinstance(self.base(node), nn.Module):
            self.own_code(self.base(node), "__iter__")
        else:
            self.evaluate(node)
        modules = self.may_hold(node)
        function = node.func if isinstance(node, ast.Call) else None
        names = getattr(function, "attr", getattr(function, "id", None)) in _NUMBERED
        if names and isinstance(target, ast.Tuple) and len(target.elts) == 2:
            self.store(target.elts[0])
            target = target.elts[1]
        self.store(target, modules)

    def own_code(self, module: nn.Module, name: str) -> None:
        """Python calls the method by itself: it must be PyTorch's."""
        own = in_classes(type(module), name)
        if own is not UNKNOWN and not is_layer_code(own):
            raise ImpureError(f"{type(module).__name__} has a {name} of its own")

    # Expressions: the value where it is the same at every call, else UNKNOWN.

    def evaluate(self, node: ast.expr | None) -> Any:
        if node is None:
            return UNKNOWN
        value = self.base(node)
        if isinstance(value, (ModuleType, Children, Constants)):
            raise ImpureError(f"it hands on {ast.unparse(node)}")
        if isinstance(value, nn.Module) and value is not self.module:
            for name in ("__iter__", "__len__", "__bool__", "__contains__"):
                self.own_code(value, name)
        return value

    def base(self, node: ast.expr) -> Any:
        """The same, where what can be changed in place is welcome, too: Python's modules, dicts of attributes."""
        if type(node) not in _EVALUATE:
            raise ImpureError(f"it has an expression '{ast.unparse(node)}'")
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
            return UNKNOWN
        else:
            value = self.function.__globals__.get(name, getattr(builtins, name, UNKNOWN))
            what = f"the global name {name}"
        if value is UNKNOWN:
            return UNKNOWN  # NameError
        return self.reader.value(value, what)

    def attribute(self, node: ast.Attribute) -> Any:
        base = self.base(node.value)
        if isinstance(base, nn.Module):
            return self.of_module(base, node.attr)
        if isinstance(base, ModuleType):
            if node.attr not in vars(base):  # some are loaded when they are asked for
                raise ImpureError(f"it asks for {base.__name__}.{node.attr}")
            return self.reader.value(vars(base)[node.attr], f"{base.__name__}.{node.attr}")
        if isinstance(base, Super):
            return base.attribute(node.attr)
        if isinstance(base, (Children, Constants)):
            if node.attr not in _READS:
                raise ImpureError(f"it changes {ast.unparse(node.value)}")
            return UNKNOWN
        if base is not UNKNOWN:
            if isinstance(base, str) and node.attr.startswith("format"):
                raise ImpureError("it formats values")
            return UNKNOWN  # of a constant
        if node.attr in _CHANGES and getattr(node.value, "id", None) not in self.fresh:
            raise ImpureError(f"it calls {ast.unparse(node)}")
        modules = self.may_hold(node.value)
        for module in modules:
            self.of_module(module, node.attr)
        alone = modules and isinstance(node.value, ast.Name) and node.value.id not in self.mixed
        return UNKNOWN if alone else self.of_unknown(node.attr)

    def of_module(self, module: nn.Module, name: str) -> Any:
        if name in _OF_MODULES and in_classes(type(module), name) is in_classes(nn.Module, name):
            return UNKNOWN
        if name == "_modules":
            return Children(module)
        return self.reader.training if name == "training" else self.reader.attribute(module, name)

    def of_unknown(self, name: str) -> Any:
        """Of a tensor, a list, or a module of the network that a local name holds: of any of them that has it."""
        modules = list(self.reader.root.modules())
        holders = [m for m in modules if name in vars(m) or _of_own_class(m, name)]
        if not holders and name not in _OF_VALUES and name not in _OF_MODULES:
            stores = (store for m in modules for store in (m._modules, m._parameters, m._buffers))
            if not any(name in store for store in stores):
                raise ImpureError(f"it asks for an attribute {name}")
        for m in holders:
            self.of_module(m, name)
        return UNKNOWN

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
        if any(modules) and not (is_hashable(function) and function in BUILTINS):
            self.hand_on(node, function, modules)
        return False if is_hashable(function) and function in CONSTANT else UNKNOWN

    def hand_on(self, node: ast.Call, function: Any, modules: list[list[nn.Module]]) -> None:
        """Modules are among the arguments: the code that gets them is read once more."""
        plain = not node.keywords and not any(isinstance(a, ast.Starred) for a in node.args)
        if not isinstance(function, FunctionType) or not plain or len(modules) > function.__code__.co_argcount:
            raise ImpureError(f"it hands modules on: {ast.unparse(node)}")
        self.reader.read(function, None, dict(zip(function.__code__.co_varnames, modules, strict=False)))

    def super(self, node: ast.Call) -> Any:
        """``super()``, or as it was once written, with the class and the module."""
        owner = self.type_of(node.args[0]) if node.args else self.closure.get("__class__")
        if self.module is None or not isinstance(owner, type) or owner not in type(self.module).__mro__:
            raise ImpureError("it calls super() of something else")
        return Super(self.reader, self.module, owner)

    def asked_for_type(self, node: ast.Call) -> Any:
        """The type of a layer is watched; that of an argument is a tensor's, or nothing runs fused."""
        value, kinds = node.args
        wanted = [self.type_of(k) for k in (kinds.elts if isinstance(kinds, ast.Tuple) else [kinds])]
        module = self.evaluate(value)
        modules = self.may_hold(value)
        for m in modules:
            self.reader.asked.setdefault(m, set()).add("__class__")
        if isinstance(module, nn.Module):
            return isinstance(module, tuple(wanted))
        if modules and isinstance(value, ast.Name) and value.id not in self.mixed:
            return UNKNOWN
        of_argument = isinstance(value, ast.Name) and value.id in self.arguments and not self.held.get(value.id)
        if not of_argument or not all(k in (Tensor, list, tuple, dict, str, int, float, bool) for k in wanted):
            raise ImpureError(f"it asks for {ast.unparse(node)}")
        return UNKNOWN

    def type_of(self, node: ast.expr) -> type:
        """A class by its name, which may not be called."""
        value: Any = UNKNOWN
        if isinstance(node, ast.Name) and node.id not in self.locals:
            value = self.closure.get(node.id, self.function.__globals__.get(node.id, getattr(builtins, node.id, None)))
        elif isinstance(node, ast.Attribute):
            base = self.base(node.value)
            value = vars(base).get(node.attr) if isinstance(base, ModuleType) else None
        if not isinstance(value, type):
            raise ImpureError(f"it asks for a type by {ast.unparse(node)}")
        return value

    def got(self, node: ast.Call) -> Any:
        """``getattr`` and ``hasattr`` of a module, by a name that is known."""
        owner, name = node.args[0], self.evaluate(node.args[1])
        module = self.evaluate(owner)
        modules = [module] if isinstance(module, nn.Module) else self.may_hold(owner)
        known = isinstance(owner, ast.Name) and owner.id not in self.mixed
        if not modules or (not known and modules != [module]) or not isinstance(name, str):
            raise ImpureError(f"it calls {ast.unparse(node)}")
        for default in node.args[2:]:
            self.evaluate(default)
        values = [self.of_module(m, name) for m in modules]
        if ast.unparse(node.func) == "hasattr":
            there = {hasattr(m, name) for m in modules}
            return there.pop() if len(there) == 1 else UNKNOWN
        return values[0] if len(modules) == 1 and len(node.args) == 2 else UNKNOWN

    def compare(self, node: ast.Compare) -> Any:
        membership = isinstance(node.ops[0], (ast.In, ast.NotIn))
        with_none = any(isinstance(v, ast.Constant) and v.value is None for v in (node.left, *node.comparators))
        compared = [node.left] if membership else [node.left, *node.comparators]
        if not with_none and any(map(self.may_hold, compared)):
            raise ImpureError(f"it compares layers: {ast.unparse(node)}")
        right = [self.base(v) if membership else self.evaluate(v) for v in node.comparators]
        values = [self.evaluate(node.left), *(v.value if isinstance(v, Constants) else v for v in right)]
        if any(isinstance(v, (Children, ModuleType, nn.Module)) for v in right) and membership:
            return UNKNOWN
        if len(values) != 2 or any(v is UNKNOWN for v in values):
            return UNKNOWN
        try:
            return _COMPARE[type(node.ops[0])](*values)
        except (KeyError, TypeError):
            return UNKNOWN

    def bool_op(self, node: ast.BoolOp) -> Any:
        stops = isinstance(node.op, ast.Or)  # at the first that is true
        value: Any = UNKNOWN
        unknown = False
        for part in node.values:
            value = self.evaluate(part)
            unknown = unknown or value is UNKNOWN
            if value is not UNKNOWN and bool(value) is stops:
                return UNKNOWN if unknown else value
        return UNKNOWN if unknown else value

    def unary_op(self, node: ast.UnaryOp) -> Any:
        value = self.evaluate(node.operand)
        return not value if isinstance(node.op, ast.Not) and value is not UNKNOWN else UNKNOWN

    def if_exp(self, node: ast.IfExp) -> Any:
        test = self.evaluate(node.test)
        if test is not UNKNOWN:
            return self.evaluate(node.body if test else node.orelse)
        self.evaluate(node.body)
        self.evaluate(node.orelse)
        return UNKNOWN

    def named_expr(self, node: ast.NamedExpr) -> Any:
        self.store(node.target, self.may_hold(node.value))
        return self.evaluate(node.value)

    def subscript(self, node: ast.Subscript) -> Any:
        value, index = self.base(node.value), self.evaluate(node.slice)
        if isinstance(value, Constants):
            return value.value.get(index, UNKNOWN) if is_plain(index) else UNKNOWN
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

    def parts(self, node: ast.expr) -> Any:
        """Whose value is made of those of its parts."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod) and isinstance(node.left, ast.Constant):
            raise ImpureError("it formats values")
        for part in ast.iter_child_nodes(node):
            if isinstance(part, ast.expr):
                self.evaluate(part)
        return UNKNOWN

    def comprehension(self, node: Any) -> Any:
        for generator in node.generators:
            self.locals |= {n.id for n in ast.walk(generator.target) if isinstance(n, ast.Name)}
            self.loop(generator.target, generator.iter)
            self.stored |= {n.id for n in ast.walk(generator.target) if isinstance(n, ast.Name)}
            for condition in generator.ifs:
                self.evaluate(condition)
        for part in ("elt", "key", "value"):
            if hasattr(node, part):
                self.evaluate(getattr(node, part))
        return UNKNOWN


_EVALUATE: dict[type[ast.expr], Callable[[Code, Any], Any]] = {
    ast.Constant: Code.constant,
    ast.Name: Code.name,
    ast.Attribute: Code.attribute,
    ast.Call: Code.call,
    ast.Compare: Code.compare,
    ast.BoolOp: Code.bool_op,
    ast.UnaryOp: Code.unary_op,
    ast.IfExp: Code.if_exp,
    ast.NamedExpr: Code.named_expr,
    ast.Subscript: Code.subscript,
    **dict.fromkeys((ast.BinOp, ast.Tuple, ast.List, ast.Dict, ast.Set, ast.Starred, ast.Slice), Code.parts),
    **dict.fromkeys((ast.ListComp, ast.GeneratorExp, ast.SetComp, ast.DictComp), Code.comprehension),
}


class Super:
    """``super()`` in a method of ``owner``."""

    def __init__(self, reader: Reader, module: nn.Module, owner: type) -> None:
        self.reader, self.module, self.owner = reader, module, owner

    def attribute(self, name: str) -> Any:
        value = in_classes(type(self.module), name, self.owner)
        if isinstance(value, FunctionType):
            self.reader.method(value, self.module)
            return UNKNOWN
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

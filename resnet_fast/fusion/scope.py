"""Names in the code of one function: what each stands for while :mod:`.expressions` reads it."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable, Mapping
from types import CellType, FunctionType
from typing import Any

from torch import nn

from .allowlist import UNKNOWN
from .function_source import FunctionNode

__all__ = ["Scope"]


class Scope:
    """Names of ``function``, bound to ``module`` or to none.

    modules_in: by local name, the modules that its value may be, contain or give when it is iterated: rather more
    than fewer. Those of the arguments are known from the call.
    """

    def __init__(
        self,
        node: FunctionNode,
        function: FunctionType,
        module: nn.Module | None,
        modules_in: Mapping[str, Iterable[nn.Module]],
    ) -> None:
        code = function.__code__
        self.module, self.globals = module, function.__globals__
        self.self_name = code.co_varnames[0] if module is not None and code.co_argcount else None
        self.locals = {*code.co_varnames, *code.co_cellvars}
        self.loop_names: set[str] = set()  # targets of comprehensions that were read
        self.arguments = {a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)}  # not assigned since
        self.own_containers = _own_containers(node) - self.arguments
        self.modules_in: dict[str, dict[nn.Module, None]] = {name: dict.fromkeys(m) for name, m in modules_in.items()}
        self.not_only_modules: set[str] = set()  # local names that were assigned something else, too
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        self.closure = {name: cell.cell_contents for name, cell in cells if cell != CellType()}

    def bind(self, name: str, modules: Iterable[nn.Module]) -> None:
        """The value of the local name may hold ``modules``, and their children."""
        known = self.modules_in.setdefault(name, {})
        known.update(dict.fromkeys(modules))
        known.update(dict.fromkeys(child for m in modules for child in m.children()))

    def assign(self, name: str, modules: Iterable[nn.Module]) -> None:
        """``name = value``, where the value may hold ``modules``."""
        modules = list(modules)
        self.arguments.discard(name)
        self.bind(name, modules)
        if not modules:
            self.not_only_modules.add(name)

    def look_up(self, name: str) -> tuple[Any, str]:
        """The value of a name from outside of the function, and what to call it; UNKNOWN of a local name."""
        if name in self.closure and name not in self.loop_names:
            return self.closure[name], f"the name {name}"
        if name in self.locals or name in self.loop_names:
            return UNKNOWN, name
        return self.globals.get(name, getattr(builtins, name, UNKNOWN)), f"the global name {name}"


def _own_containers(node: FunctionNode) -> set[str]:
    """Names that are assigned nothing but containers that the code makes itself."""
    values: dict[str, list[ast.expr]] = {}
    for n in ast.walk(node):
        if isinstance(n, ast.Assign):
            for target in n.targets:
                if isinstance(target, ast.Name):
                    values.setdefault(target.id, []).append(n.value)
    return {name for name, assigned in values.items() if all(map(_makes_container, assigned))}


def _makes_container(node: ast.expr) -> bool:
    named = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("list", "dict", "OrderedDict", "set")
    return named or isinstance(node, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp))

"""The statements of a function: which it may have, and which of them run; the rest raise ImpureError.

:mod:`.purity` hands the function's syntax tree in. Branches that are not taken are not read.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from types import FunctionType

from torch import nn

from .allowlist import UNKNOWN, ImpureError
from .expressions import ExpressionReader
from .function_source import FunctionNode
from .scope import Scope
from .values import ValueChecker

__all__ = ["read_function"]


def read_function(
    values: ValueChecker,
    node: FunctionNode,
    function: FunctionType,
    module: nn.Module | None,
    modules_in: Mapping[str, Iterable[nn.Module]],
) -> None:
    """``node`` is the code of ``function``, bound to ``module`` or to none; its arguments may hold ``modules_in``."""
    expressions = ExpressionReader(values, Scope(node, function, module, modules_in))
    if isinstance(node, ast.Lambda):
        expressions.evaluate(node.body)
    else:
        _StatementReader(expressions).read(node.body)


class _StatementReader:
    def __init__(self, expressions: ExpressionReader) -> None:
        self.expressions = expressions
        self.evaluate, self.modules_in = expressions.evaluate, expressions.modules_in

    def read(self, body: Iterable[ast.stmt]) -> None:
        for statement in body:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, (ast.Pass, ast.Raise, ast.Break, ast.Continue)):
            return  # code that raises now is refused; otherwise it never comes here
        if isinstance(node, ast.If):
            test = self.evaluate(node.test)
            if test is UNKNOWN or bool(test):
                self.read(node.body)
            if test is UNKNOWN or not test:
                self.read(node.orelse)
        elif isinstance(node, (ast.Expr, ast.Return)):
            if node.value is not None:
                self.evaluate(node.value)
        elif isinstance(node, ast.Assign):
            self.evaluate(node.value)
            for target in node.targets:
                self.expressions.assign(target, self.modules_in(node.value))
        elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
            if node.value is not None:
                self.evaluate(node.value)
                self.expressions.assign(node.target, self.modules_in(node.value))
        elif isinstance(node, ast.Assert):
            self.evaluate(node.test)
        elif isinstance(node, ast.For):
            self.expressions.loop(node.target, node.iter)
            for _ in range(2):  # names that the first pass binds to modules matter in the second
                self.read([*node.body, *node.orelse])
        elif isinstance(node, ast.While):
            for _ in range(2):
                self.evaluate(node.test)
                self.read([*node.body, *node.orelse])
        elif isinstance(node, ast.Delete) and all(isinstance(t, ast.Name) for t in node.targets):
            return
        else:
            raise ImpureError(f"it has a statement '{_keyword(node)}'")


def _keyword(node: ast.stmt) -> str:
    return ast.unparse(node).split(maxsplit=1)[0].rstrip(":")

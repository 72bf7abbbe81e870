"""The syntax tree of a function that is already compiled; :mod:`.purity` reads it.

Files change while programs run, and functions are found by line number: a tree is returned only if it compiles to the
very code that runs.
"""

from __future__ import annotations

import ast
import linecache
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType

__all__ = ["FunctionNode", "function_ast"]

FunctionNode = ast.FunctionDef | ast.Lambda
_Key = tuple[str, int]  # name and first line


@lru_cache(4096)
def function_ast(code: CodeType) -> FunctionNode | str:
    """The function as its file defines it, or why that is not known."""
    key = code.co_name, code.co_firstlineno
    codes, nodes = _parsed(code.co_filename, tuple(linecache.getlines(code.co_filename)))
    if key not in codes or key not in nodes:
        return "whose source is not at hand"
    if not any(_is_same(code, compiled) for compiled in codes[key]):
        return "whose source has changed"
    found = nodes[key]
    if len(found) > 1:
        found = [node for node in found if _lies_in(code, node)]
    return found[0] if len(found) == 1 else "of which there are several in a line"


@lru_cache(256)
def _parsed(name: str, lines: tuple[str, ...]) -> tuple[dict[_Key, list[CodeType]], dict[_Key, list[FunctionNode]]]:
    """All functions of a file: compiled anew, and as syntax trees."""
    codes: dict[_Key, list[CodeType]] = {}
    nodes: dict[_Key, list[FunctionNode]] = {}
    try:
        tree = ast.parse("".join(lines))
        module = compile(tree, name, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return {}, {}
    for code in _nested_codes(module):
        codes.setdefault((code.co_name, code.co_firstlineno), []).append(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            line = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            nodes.setdefault((node.name, line), []).append(node)
        elif isinstance(node, ast.Lambda):
            nodes.setdefault(("<lambda>", node.lineno), []).append(node)
    return codes, nodes


def _nested_codes(code: CodeType) -> Iterator[CodeType]:
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield inner
            yield from _nested_codes(inner)


def _is_same(a: CodeType, b: CodeType) -> bool:
    inner = [[c for c in code.co_consts if isinstance(c, CodeType)] for code in (a, b)]
    constants = [repr([c for c in code.co_consts if not isinstance(c, CodeType)]) for code in (a, b)]
    return (
        (a.co_code, a.co_names, a.co_varnames, a.co_freevars, a.co_cellvars)
        == (b.co_code, b.co_names, b.co_varnames, b.co_freevars, b.co_cellvars)
        and constants[0] == constants[1]
        and len(inner[0]) == len(inner[1])
        and all(map(_is_same, *inner))
    )


def _lies_in(code: CodeType, node: FunctionNode) -> bool:
    """Whether ``node`` spans all instructions; Python 3.10 does not say."""
    if not hasattr(code, "co_positions"):
        return False
    places = [(line, column) for line, _, column, _ in code.co_positions() if line and column]
    begin, end = (node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)
    return bool(places) and all(begin <= place <= end for place in places)

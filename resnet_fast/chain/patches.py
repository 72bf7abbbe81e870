"""Monkey-patching: which functions a call of a module runs, and whether someone replaced one, in class or instance.

A patched class (``nn.Conv2d.forward = ...``) stays the same object, so the functions themselves are compared. The
recorder refuses a chain for a replaced function; :mod:`.guard` notices one replaced later.
"""

from __future__ import annotations

import builtins
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial, partialmethod
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, TypeVar

from torch import nn

__all__ = [
    "CALL",
    "call_replaced",
    "called",
    "constant",
    "digest",
    "functions",
    "is_original",
    "lookups",
    "methods",
    "own_method",
    "register",
    "register_layers",
    "replaced",
    "surroundings",
]

_F = TypeVar("_F", bound=Callable[..., Any])

# Methods that a call runs before ``forward``. torch.export replaces them while it traces.
CALL = ("__call__", "_call_impl")
# Attributes of registered classes when this package first saw them.
_registered: dict[type, dict[str, Any]] = {}
_methods: dict[type, tuple[str, ...]] = {}
_UNKNOWN = object()  # stands for a function of PyTorch's that had been replaced before: no attribute is this


def constant(function: _F) -> _F:
    """Makes the compiler call ``function`` while it traces, instead of tracing it.

    Equivalent to ``torch.compiler.assume_constant_result``, which would import the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _names(value: Any) -> Iterator[str]:
    """Names that the code of a function, a property or a wrapper of them may look up."""
    waiting, known = [value], set()
    while waiting:
        part = waiting.pop()
        if id(part) in known:
            continue
        known.add(id(part))
        if isinstance(part, str):
            yield part
        elif isinstance(part, CodeType):
            yield from part.co_names
            waiting += part.co_consts
        elif isinstance(part, tuple):
            waiting += part
        elif isinstance(part, FunctionType):
            waiting.append(part.__code__)
            waiting += [cell.cell_contents for cell in part.__closure__ or () if cell != CellType()]
        elif isinstance(part, (property, staticmethod, classmethod, partial, partialmethod, cached_property)):
            waiting += [getattr(part, inner, None) for inner in ("fget", "__func__", "func")]


def _classes(kind: type) -> list[type]:
    return [c for c in kind.__mro__ if c not in (nn.Module, object)]


def called(kind: type) -> tuple[str, ...]:
    """``forward``, and the class attributes that its code may look up, directly or through one another."""
    classes = _classes(vars(kind).get("fused_from", kind))
    found: dict[str, None] = {}
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        values = [] if name in found else [vars(c)[name] for c in classes if name in vars(c)]
        if values:
            found[name] = None
            for value in values:
                waiting += _names(value)
    return tuple(found) or ("forward",)


@constant
def methods(kind: type) -> tuple[str, ...]:
    """:func:`called` for PyTorch's registered layers; ``forward`` for other classes."""
    return _methods.get(kind, ("forward",))


def lookups(kind: type, names: Sequence[str]) -> dict[type, list[str]]:
    """Classes in which Python looks ``names`` up, from ``kind`` along its MRO, without nn.Module; with these names."""
    classes = _classes(kind)
    found: dict[type, list[str]] = {}
    for name in (*names, "__call__"):
        having = [i for i, c in enumerate(classes) if name in vars(c)]
        for c in classes[: max(having, default=0) + 1]:
            found.setdefault(c, []).append(name)
    return found


def functions(kind: type, asked: Sequence[str] = ()) -> list[Any]:
    """All that a call of ``kind.forward`` and the names ``asked`` look up, to be compared by identity."""
    own = [vars(c).get(name) for c, names in lookups(kind, (*called(kind), *asked)).items() for name in names]
    return own + surroundings(own).values()


class Surroundings(NamedTuple):
    """The surroundings of functions: the global names they read, their closure variables, and their code objects."""

    names: dict[int, tuple[dict[str, Any], list[str]]]
    cells: list[CellType]
    functions: list[FunctionType]

    def values(self) -> list[Any]:
        """All current values, to be compared by identity."""
        found = [space.get(name) for space, names in self.names.values() for name in names]
        found += [cell.cell_contents for cell in self.cells if cell != CellType()]
        return found + [part for f in self.functions for part in (f.__code__, f.__defaults__, f.__kwdefaults__)]


def surroundings(values: Iterable[Any]) -> Surroundings:
    """The surroundings of the functions among ``values`` and, transitively, of those that they reach by name."""
    found = Surroundings({}, [], [])
    waiting = [part for value in values for part in _functions_in(value)]
    known: set[int] = set()
    while waiting:
        function = waiting.pop(0)
        if id(function) in known or _is_pytorchs(function):
            continue
        known.add(id(function))
        found.functions.append(function)
        cells = list(function.__closure__ or ())
        found.cells.extend(cells)
        inner = [cell.cell_contents for cell in cells if cell != CellType()]
        wanted = set(_names(function.__code__))
        spaces = [function.__globals__]
        for space in spaces:  # the loop appends to it
            _, names = found.names.setdefault(id(space), (space, []))
            for name in sorted(wanted):
                value = space.get(name)
                hides = space is function.__globals__ and hasattr(builtins, name)
                if name not in names and (name in space or hides):
                    names.append(name)
                if isinstance(value, ModuleType) and not any(vars(value) is s for s in spaces):
                    spaces.append(vars(value))
                inner.append(value)
        waiting += [part for value in inner for part in _functions_in(value)]
    return found


def _functions_in(value: Any) -> list[FunctionType]:
    """``value`` itself if it is a function, or the functions that it wraps."""
    if isinstance(value, FunctionType):
        return [value]
    if isinstance(value, (property, staticmethod, classmethod, partial, MethodType)):
        inner = (getattr(value, part, None) for part in ("fget", "__func__", "func"))
        return [f for f in inner if isinstance(f, FunctionType)]
    return []


def _content(value: Any) -> Any:
    """A description of a class attribute that differs in another process if the attribute does."""
    if isinstance(value, CodeType):
        constants = sorted(map(repr, map(_content, value.co_consts)))  # sets of strings have no order
        return value.co_code, value.co_names, constants
    if isinstance(value, (frozenset, tuple)):
        return sorted(map(repr, map(_content, value)))
    if isinstance(value, FunctionType):
        return value.__module__, value.__qualname__, _content(value.__code__)
    if isinstance(value, (property, staticmethod, classmethod)):
        return _content(getattr(value, "__func__", None) or getattr(value, "fget", None))
    return value if isinstance(value, (type(None), bool, int, float, complex, str, bytes)) else type(value).__qualname__


@constant
def digest(kind: type, asked: tuple[str, ...] = ()) -> str:
    """A digest of :func:`functions`, comparable between copies and processes."""
    return hashlib.sha256(repr(list(map(_content, functions(kind, asked)))).encode()).hexdigest()


def _is_pytorchs(value: Any) -> bool:
    """Whether ``value`` is a function of PyTorch's, or no function."""
    name = str(getattr(value, "__globals__", {"__name__": "torch"}).get("__name__"))
    return name.partition(".")[0] == "torch"


def register(*kinds: type, alone: bool = False) -> None:
    """Remembers the attributes of ``kinds`` and, unless ``alone``, of their base classes, for :func:`replaced`."""
    for kind in kinds:
        for c in (kind,) if alone else kind.__mro__[:-1]:
            theirs = c.__module__.partition(".")[0] == "torch"
            own = {name: _UNKNOWN if theirs and not _is_pytorchs(value) else value for name, value in vars(c).items()}
            _registered.setdefault(c, own)


def register_layers(*kinds: type) -> None:
    """:func:`register` for PyTorch's layers, with all methods that their ``forward`` calls."""
    register(*kinds)
    _methods.update((kind, called(kind)) for kind in kinds)


@constant
def replaced(kind: type, names: Sequence[str]) -> str | None:
    """Which of ``names`` was replaced in a registered class since; or None."""
    for c, own in lookups(kind, names).items():
        if c in _registered:
            for name in own:
                if not is_original(c, name):
                    return f"another {c.__name__}.{name}"
    return None


def call_replaced() -> str | None:
    """Which of the methods that every call of a module runs was replaced; or None."""
    other = next((name for name in CALL if not is_original(nn.Module, name)), None)
    return None if other is None else f"another Module.{other}"


@constant
def is_original(kind: type, name: str) -> bool:
    """Whether attribute ``name`` of a registered class is still the one that it had when it was registered."""
    return vars(kind).get(name) is _registered[kind].get(name)


def own_method(module: nn.Module, names: Sequence[str]) -> str | None:
    """Which of ``names`` the instance overrides; or None."""
    for name in names:
        if name in module.__dict__:
            return f"a {type(module).__name__} with a {name} of its own"
    return None

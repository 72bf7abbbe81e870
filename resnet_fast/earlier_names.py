"""Aliases for modules and classes that pickles of earlier versions name, so that these still load."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["install"]

# By earlier module: where its classes are now, and those that have another name.
_MOVED: dict[str, tuple[str, dict[str, str]]] = {
    "convert": ("fusion.convert", {"Fusion": "FusionState", "FusedTraced": "ConvertedModule"}),
    "frozen_norm": ("chain.frozen_norm", {}),
    "plan": ("fusion.plan", {"Opened": "ModuleGuard"}),
    "pooling": ("chain.pooling", {}),
}


class _EarlierModule(ModuleType):
    def __init__(self, name: str, now: str, renamed: dict[str, str]) -> None:
        super().__init__(name)
        self._now, self._renamed = now, renamed

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._now), self._renamed.get(name, name))


def install() -> None:
    """Puts the aliases where ``pickle`` looks modules up."""
    for name, (now, renamed) in _MOVED.items():
        earlier = f"{__package__}.{name}"
        sys.modules.setdefault(earlier, _EarlierModule(earlier, f"{__package__}.{now}", renamed))

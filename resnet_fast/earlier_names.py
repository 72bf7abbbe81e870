"""Aliases for modules and classes that pickles of earlier versions name, so that these still load."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["install"]

# By earlier module: where its names are now, and those that are elsewhere or have another name.
_MOVED: dict[str, tuple[str, dict[str, str]]] = {
    "convert": (
        "fusion.convert",
        {
            "Fusion": "fusion.convert.FusionState",
            "FusedTraced": "fusion.converted_module.ConvertedModule",
            "_again": "fusion.converted_module._rebuild",
        },
    ),
    "frozen_norm": ("chain.frozen_norm", {}),
    "plan": (
        "fusion.execution_plan",
        {
            "Opened": "fusion.module_guard.ModuleGuard",
            "Plan": "fusion.execution_plan.ExecutionPlan",
            "_Named": "fusion.execution_plan._FunctionName",
        },
    ),
    "pooling": ("chain.pooling", {}),
}


class _EarlierModule(ModuleType):
    def __init__(self, name: str, now: str, elsewhere: dict[str, str]) -> None:
        super().__init__(name)
        self._now, self._elsewhere = now, elsewhere

    def __getattr__(self, name: str) -> Any:
        module, _, now = self._elsewhere.get(name, f"{self._now}.{name}").rpartition(".")
        return getattr(import_module(f"{__package__}.{module}"), now)


def install() -> None:
    """Puts the aliases where ``pickle`` looks modules up."""
    for name, (now, elsewhere) in _MOVED.items():
        earlier = f"{__package__}.{name}"
        sys.modules.setdefault(earlier, _EarlierModule(earlier, now, elsewhere))

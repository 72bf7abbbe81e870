"""Rows of the history of a run, one an epoch, in checkpoints and in log.csv."""

from __future__ import annotations

from typing import Any

__all__ = ["accuracy", "best_step", "held_out"]


def held_out(row: dict[str, Any]) -> str:
    """Which images the epoch was evaluated on: ``"validation"`` or ``"test"``."""
    return "validation" if "validation_accuracy" in row else "test"


def accuracy(row: dict[str, Any]) -> float:
    """The accuracy on those images, by which the best epoch is chosen."""
    return row[f"{held_out(row)}_accuracy"]


def best_step(history: list[dict[str, Any]]) -> int | None:
    """The step after which the network was best, the first of equals; None before the first epoch's end."""
    # max returns the first of equals.
    return max(history, key=accuracy)["step"] if history else None

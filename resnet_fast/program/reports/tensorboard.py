"""The log of a run for TensorBoard, beside log.csv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .history import held_out

__all__ = ["Log"]


class Log:
    """Writes rows of the log into ``folder``; what an earlier part of the run wrote from ``step`` on does not count."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        self._writer = SummaryWriter(str(folder), purge_step=step)

    def row(self, row: dict[str, Any]) -> None:
        """Quantities of training and of the images held out in one chart each, by step."""
        held = held_out(row)
        for name, value in row.items():
            if name in ("epoch", "step"):
                continue
            part, _, quantity = name.partition("_")
            name = f"{quantity}/{part}" if part in ("train", held) else name
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

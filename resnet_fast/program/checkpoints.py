"""Checkpoints, written atomically: the newest few and the best are kept.

Each is written to a temporary file, synced to disk and renamed, so that a crash or a full disk leaves the one before
intact. Loading unpickles tensors and plain values only (``weights_only``).
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import torch

from .options import ProgramError

__all__ = ["FORMAT", "content", "load", "newest", "save", "write"]

FORMAT = 1


def write(path: Path, content: bytes) -> None:
    """Writes the file atomically; on OSError the old file stays."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Syncs the folder, so that the rename is on disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _numbered(folder: Path) -> list[Path]:
    """Checkpoints in ``folder``, oldest first."""
    found = [path for path in folder.glob("step-*.pt") if re.fullmatch(r"step-\d+\.pt", path.name)]
    return sorted(found, key=lambda path: int(path.stem[5:]))


def newest(folder: Path) -> Path | None:
    return max(_numbered(folder), key=lambda path: int(path.stem[5:]), default=None)


def save(folder: Path, state: dict[str, Any], *, keep: int, best: bool) -> Path:
    """Writes ``folder/step-N.pt`` for ``state["step"]``, with ``best`` also ``best.pt``; removes all but ``keep``.

    Raises:
        ProgramError: it could not be written; the message names the last good checkpoint.
    """
    # Serialise in memory first: torch.save does not say why a write to disk failed.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    content = buffer.getvalue()
    path = folder / f"step-{state['step']:08d}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(path, content)
        if best:
            write(folder / "best.pt", content)
        for old in _numbered(folder)[:-keep]:
            old.unlink()
    except OSError as error:
        last = newest(folder) if folder.is_dir() else None
        left = f"the last good one is {last}" if last is not None else "there is none yet"
        raise ProgramError(f"checkpoint {path} cannot be written: {error.strerror}; {left}") from error
    return path


def content(path: Path) -> Any:
    """What a file of ``torch.save`` holds, whoever wrote it.

    Raises:
        ProgramError: the file is missing or damaged, or holds more than tensors and plain values.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # torch.load raises pickle, zip or runtime errors, depending on the damage.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ProgramError(f"checkpoint {path} cannot be loaded: {reason}") from error


def load(path: Path) -> dict[str, Any]:
    """The state in ``path``.

    Raises:
        ProgramError: the file is missing or damaged, holds more than tensors and plain values, or has another format.
    """
    state = content(path)
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise ProgramError(f"checkpoint {path} has format {found}, want {FORMAT}: not of resnet_fast.train")
    return state

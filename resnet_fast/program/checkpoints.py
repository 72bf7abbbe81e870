"""Checkpoints, written atomically: the newest few and the best are kept.

Each is written to a temporary file, synced to disk and renamed, so that a crash or a full disk leaves the one before
intact. Loading unpickles tensors and plain values only (``weights_only``), once the checksums of the file are right. A
sharded one is a folder; :mod:`.sharded` writes it.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import socket
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from .options import ProgramError
from .reports.history import best_step, held_out

__all__ = ["FORMAT", "clean", "content", "load", "newest", "restore_best", "save", "write"]

FORMAT = 1
_BEST = "best.pt"
_WRITING = "writing"
_OLD = f".old.{_WRITING}"
# What a state holds at least, and of which type: what is read without asking.
_CONTENT: dict[str, Any] = {
    "step": int,
    "epoch": int,
    "done": int,
    "model": dict,
    "optimizer": dict,
    "schedule": dict,
    "scaler": dict,
    "rng": list,
    "sums": list,
    "lr": float,
    "history": list,
    "options": dict,
    "preparation": dict,
}


def temporary(path: Path) -> Path:
    """Where this process writes what is to become ``path``; no other process writes there."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.{_WRITING}")


def clean(folder: Path) -> None:
    """Removes what programs that were killed have left half written; call it while no other program writes.

    A folder that was to be replaced comes back where its successor has not.
    """
    for path in folder.glob(f".step-*{_OLD}"):
        whole = path.with_name(path.name.removeprefix(".").removesuffix(_OLD))
        if not whole.exists():
            os.replace(path, whole)
    for path in folder.glob(f".*.{_WRITING}"):
        remove(path)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Writes the file atomically; on OSError the old file stays."""
    part = temporary(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Syncs the folder, so that the rename is on disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin(path: Path) -> Path:
    """A new folder, in which to write what :func:`publish` makes the checkpoint ``path``."""
    part = temporary(path)
    with_reason(path, lambda: part.mkdir(parents=True))
    return part


def publish(part: Path, path: Path) -> None:
    """Makes the folder ``part`` the checkpoint ``path``, in place of one of the same step."""
    old = path.with_name(f".{path.name}{_OLD}")
    if path.exists():
        os.replace(path, old)
    os.replace(part, path)
    _sync_folder(path.parent)
    remove(old)


def name_of(step: int, *, sharded: bool = False) -> str:
    return f"step-{step:08d}" + ("" if sharded else ".pt")


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells; -1 for another file."""
    found = re.fullmatch(r"step-(\d+)(\.pt)?", path.name)
    return -1 if found is None else int(found[1])


def _numbered(folder: Path) -> list[Path]:
    """Checkpoints in ``folder``, oldest first."""
    return sorted((path for path in folder.glob("step-*") if step_of(path) >= 0), key=step_of)


def newest(folder: Path) -> Path | None:
    return max(_numbered(folder), key=step_of, default=None)


def pack(state: dict[str, Any]) -> bytes:
    # Serialise in memory first: torch.save does not say why a write to disk failed.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    return buffer.getvalue()


def save(folder: Path, state: dict[str, Any], *, keep: int, best: bool) -> Path:
    """Writes ``folder/step-N.pt`` for ``state["step"]``, with ``best`` also ``best.pt``; removes all but ``keep``.

    Raises:
        ProgramError: it could not be written; the message names the last good checkpoint.
    """
    path, packed = folder / name_of(state["step"]), pack(state)
    with_reason(path, lambda: write(path, packed))
    if best:
        with_reason(folder / _BEST, lambda: write(folder / _BEST, packed))
    with_reason(path, lambda: prune(folder, keep))
    return path


def save_best(folder: Path, state: dict[str, Any]) -> None:
    """Writes ``folder/best.pt``; a whole state, as prediction wants it."""
    with_reason(folder / _BEST, lambda: write(folder / _BEST, pack(state)))


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest ``keep`` checkpoints."""
    for old in _numbered(folder)[:-keep]:
        if old.is_dir():  # half removed it would still look like one
            hidden = temporary(old)
            os.replace(old, hidden)
            old = hidden
        remove(old)


def with_reason(path: Path, action: Callable[[], Any]) -> None:
    """Runs ``action``, which writes ``path``; an OSError becomes a ProgramError that names the last good checkpoint."""
    try:
        action()
    except OSError as error:
        others = [other for other in _numbered(path.parent) if other != path] if path.parent.is_dir() else []
        left = f"the last good one is {others[-1]}" if others else "there is none yet"
        raise ProgramError(f"checkpoint {path} cannot be written: {error.strerror}; {left}") from error


def restore_best(folder: Path, start: Path, history: list[dict[str, Any]]) -> str | None:
    """Writes ``folder/best.pt`` where the record has it, but a stop or a full disk came before the file was written.

    ``start`` is the checkpoint that the run goes on from, maybe in another folder. Returns what to say, if anything.
    """
    step, best = best_step(history), folder / _BEST
    found = _step_in(best)
    if step is None or found == step:
        return None
    for source in (folder / name_of(step), start.parent / name_of(step), start.parent / _BEST):
        if _step_in(source) == step:
            with_reason(best, partial(write, best, source.read_bytes()))
            return f"{best} was missing or old: written again from {source}"
    if found is not None and found > history[-1]["step"]:
        return None  # of an epoch that follows now
    return f"{best} is not of step {step}, the best one, and no checkpoint of that step is left"


def _step_in(path: Path) -> int | None:
    try:
        return load(path)["step"]
    except ProgramError:
        return None


def load(path: Path, *, sharded: bool = False) -> dict[str, Any]:
    """The state in ``path``; ``sharded``: without the tensors of model and optimizer.

    Raises:
        ProgramError: the file is missing or damaged, holds more than tensors and plain values, or is not one of
            ``resnet_fast.train``.
    """
    state = content(path)
    found = state.get("format") if isinstance(state, dict) else None
    if not isinstance(found, int) or found != FORMAT:
        raise ProgramError(f"checkpoint {path} has format {_short(found)}, want {FORMAT}: not of resnet_fast.train")
    wanted = _CONTENT | ({"model": NoneType, "optimizer": list, "files": dict} if sharded else {})
    missing = [name for name, kind in wanted.items() if not isinstance(state.get(name), kind)]
    if missing:
        raise ProgramError(f"checkpoint {path} is not whole: it lacks {', '.join(missing)}")
    if not all(map(_is_row, state["history"])):
        raise ProgramError(f"checkpoint {path} is not whole: its history lacks steps or accuracies")
    return state


# What PyTorch and Python raise where a state is not of the network, or its values are of other types.
MISFITS = (AssertionError, AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)


def misfit(path: Path, error: Exception) -> ProgramError:
    lines = str(error).strip().splitlines() or [""]
    return ProgramError(
        f"checkpoint {path} does not fit: {type(error).__name__}: {' '.join(map(str.strip, lines[:2]))}"
    )


def _is_row(row: object) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("step"), int)
        and isinstance(row.get(f"{held_out(row)}_accuracy"), float)
    )


def _short(value: object) -> str:
    return str(value) if value is None or isinstance(value, int) else f"of type {type(value).__name__}"


def content(path: Path) -> Any:
    """What a file of ``torch.save`` holds, whoever wrote it.

    Raises:
        ProgramError: the file is missing or damaged, or holds more than tensors and plain values.
    """

    def refused(reason: str) -> ProgramError:
        return ProgramError(f"checkpoint {path} {reason}")

    try:
        data = path.read_bytes()
    except OSError as error:
        raise refused(f"cannot be read: {error.strerror}") from error
    if not data:
        raise refused("is empty")
    is_zip = data.startswith(b"PK\x03\x04")  # not so before PyTorch 1.6
    if is_zip:
        _compare_checksums(data, refused)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice for other kinds of files
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, depending on the damage
        if is_zip and isinstance(error, pickle.UnpicklingError):
            raise refused("holds more than tensors and plain values") from error
        raise refused("is damaged, or not a file of torch.save") from error


def _compare_checksums(data: bytes, refused: Callable[[str], ProgramError]) -> None:
    """torch.load does not compare them: a flipped bit would be a wrong weight."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()
    except Exception as error:  # of many kinds, depending on the damage
        raise refused("is truncated or damaged") from error
    if damaged is not None:
        raise refused(f"is damaged: the checksum of its part {damaged!r} is wrong")

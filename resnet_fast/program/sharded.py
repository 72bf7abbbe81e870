"""Sharded checkpoints: a folder into which each process writes its shards, through ``torch.distributed.checkpoint``.

``step-N/state.pt`` holds the rest of the state, and the checksums of all other files. Any number of processes can read
them.
"""

from __future__ import annotations

import pickle
import zlib
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as of
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.optim import Optimizer

from . import checkpoints
from .distributed import Processes
from .options import ProgramError

__all__ = ["REST", "load", "save"]

REST = "state.pt"


def _tensors(model: dict[str, Any], optimizer: dict[str, Any]) -> dict[str, Tensor]:
    """Weights, buffers and momenta by names of their own."""
    named = {f"model.{name}": t for name, t in model.items()}
    for parameter, values in optimizer["state"].items():
        named |= {f"optimizer.{parameter}.{what}": t for what, t in values.items() if isinstance(t, Tensor)}
    return named


def save(
    folder: Path, state: dict[str, Any], network: nn.Module, optimizer: Optimizer, processes: Processes, *, keep: int
) -> None:
    """Writes ``folder/step-N`` for ``state["step"]``; removes all but the newest ``keep`` checkpoints.

    Raises:
        ProgramError: it could not be written, on every process; the message names the last good checkpoint.
    """
    path = folder / checkpoints.name_of(state["step"], sharded=True)
    part = processes.from_first(lambda: checkpoints.begin(path))
    steps = of.get_optimizer_state_dict(network, optimizer)
    failure = None
    try:
        tensors = _tensors(of.get_model_state_dict(network), steps)
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(part))
    except CheckpointException as error:  # on all processes
        failure = _cause(error)
    sums = {} if failure else _checksums([*part.glob(f"__{processes.rank}_*"), *part.glob(".metadata")])
    files = {name: found for own in processes.everyone(sums) for name, found in own.items()}
    rest = {**state, "model": None, "optimizer": steps["param_groups"], "files": files}

    def finish() -> None:
        try:
            if failure:
                raise failure
            checkpoints.write(part / REST, checkpoints.pack(rest))
            checkpoints.publish(part, path)
        except OSError:
            checkpoints.remove(part)
            raise

    processes.from_first(lambda: checkpoints.with_reason(path, finish))
    processes.from_first(lambda: checkpoints.with_reason(path, lambda: checkpoints.prune(folder, keep)))


def _cause(error: CheckpointException) -> OSError:
    first = next(iter(error.failures.values()))[0]
    return first if isinstance(first, OSError) and first.strerror else OSError(0, str(first).strip().splitlines()[0])


def _checksums(files: list[Path]) -> dict[str, int]:
    return {path.name: zlib.crc32(path.read_bytes()) for path in files}


def load(path: Path, rest: dict[str, Any], network: nn.Module, optimizer: Optimizer, processes: Processes) -> None:
    """Sets weights, buffers and optimizer to those of the folder ``path``; ``rest`` is what its ``state.pt`` holds.

    Raises:
        ProgramError: a file is missing or damaged, or tensors are others than the network's.
    """
    names = sorted(rest["files"])[processes.rank :: processes.world]
    damaged = [name for name in names if not _is_whole(path / name, rest["files"][name])]
    for name in (name for own in processes.everyone(damaged) for name in own):
        raise ProgramError(f"checkpoint {path} is damaged: {name} is missing, or its checksum is wrong")
    reader = _Reader(path, _described(path))
    model, steps = of.get_model_state_dict(network), of.get_optimizer_state_dict(network, optimizer)
    try:
        dcp.load(_tensors(model, steps), storage_reader=reader)
    except CheckpointException as error:
        raise ProgramError(f"checkpoint {path} does not fit: {_cause(error).strerror}") from error
    of.set_model_state_dict(network, model)
    of.set_optimizer_state_dict(network, optimizer, {**steps, "param_groups": rest["optimizer"]})


def _is_whole(path: Path, checksum: int) -> bool:
    try:
        return zlib.crc32(path.read_bytes()) == checksum
    except OSError:
        return False


class _Unpickler(pickle.Unpickler):
    """Unpickles descriptions of tensors only: the reader of PyTorch would call whatever the file names."""

    def find_class(self, module: str, name: str) -> Any:
        described = module == "torch.distributed.checkpoint.metadata" and name != "BytesStorageMetadata"
        stored = (module, name) == ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
        of_torch = module == "torch" and name in ("Size", "float16", "bfloat16", "float32", "float64", "int64")
        layout = (module, name) == ("torch.serialization", "_get_layout")
        if described or stored or of_torch or layout or (module.startswith("pathlib") and name.endswith("Path")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _described(path: Path) -> Metadata:
    try:
        with (path / ".metadata").open("rb") as file:
            return _Unpickler(file).load()
    except Exception as error:  # of many kinds, depending on the content
        raise ProgramError(f"checkpoint {path} is not one of resnet_fast.train: its .metadata, {error}") from error


class _Reader(dcp.FileSystemReader):
    """Reads what ``metadata`` describes."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._described = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._described.storage_meta is None:
            self._described.storage_meta = StorageMeta()
        self._described.storage_meta.load_id = self.load_id
        return self._described

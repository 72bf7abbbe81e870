"""Workers: the processes that load batches."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from .batches import Batch, Batches, Images
from .workers import Loader

__all__ = ["loader", "workers_of"]


def _identity(batch: Batch) -> Batch:
    return batch


GRACE = 60  # seconds


def _outlive_signals(worker: int) -> None:
    """Makes a worker ignore SIGINT, and SIGTERM and SIGHUP for a minute: the main process decides when loading ends.

    Ctrl-C and many schedulers signal every process, but the main one needs batches until the end of the step. A worker
    alive a minute later was left behind.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.alarm(GRACE))


def loader(dataset: Images, batches: Batches, workers: int, pin: bool) -> DataLoader:
    # A worker loads a whole batch in one NumPy call; collating single images would cost more than loading them.
    return Loader(
        dataset,  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_identity,  # type: ignore[arg-type]
        pin_memory=pin,
        worker_init_fn=_outlive_signals,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # iterating must not advance the global generator, which is the network's
    )


@contextlib.contextmanager
def workers_of(*loaders: DataLoader) -> Iterator[None]:
    """Context manager: shuts the loaders' workers down at the end; the interpreter would wait for them at exit."""
    try:
        yield
    finally:
        for loaded in loaders:
            if loaded.num_workers > 0 and loaded._iterator is not None:
                loaded._iterator._shutdown_workers()  # type: ignore[attr-defined]

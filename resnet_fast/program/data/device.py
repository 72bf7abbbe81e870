"""Batches of a set in memory from the device itself, where one kernel crops, mirrors and normalises them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ...ops.augment import augment, unavailable
from ..options import Options, ProgramError
from .augment import stream
from .batches import IGNORED, Batch, Batches, Images
from .loading import loader
from .memory import Samples

__all__ = ["DeviceBatches", "loaders"]


class DeviceBatches:
    """The batches of ``loader(samples, batches, ...)`` as the network takes them, bit for bit.

    table: a pixel's 256 values after preparation, ``[3, 256]``, on the device and in the dtype of the arithmetic.
    """

    num_workers = 0

    def __init__(self, samples: Samples, batches: Batches, table: Tensor, memory_format: torch.memory_format) -> None:
        self.samples, self.batches, self.table, self.memory_format = samples, batches, table, memory_format
        self.images = torch.from_numpy(samples.images).contiguous().to(table.device)
        self.labels = torch.from_numpy(samples.labels).to(table.device, torch.int64)

    def __iter__(self) -> Iterator[Batch]:
        samples = self.samples
        chosen = None if samples.seed is None else stream(samples.seed, self.batches.epoch)
        # A whole epoch at once: the steps then copy nothing to the device.
        for index in torch.from_numpy(self.batches.indices()).to(self.table.device):
            images = augment(self.images, index, self.table, chosen, samples.padding, samples.flip)
            labels = torch.where(index >= 0, self.labels[index], IGNORED)
            yield Batch(images.contiguous(memory_format=self.memory_format), labels, [])


def loaders(
    options: Options,
    parts: Sequence[tuple[Images, Batches]],
    table: Tensor,
    memory_format: torch.memory_format,
) -> tuple[list[Any], str]:
    """For each set and its order, the batches, by ``--data-on``; and a line that says where they are prepared.

    table, memory_format: as :class:`DeviceBatches` has them.

    Raises:
        ProgramError: ``--data-on device``, and they cannot be.
    """
    device, workers = table.device, options.workers
    reason = "--data-on workers" if options.data_on == "workers" else _obstacle(device, [images for images, _ in parts])
    if reason is None:
        held = [DeviceBatches(cast(Samples, images), order, table, memory_format) for images, order in parts]
        size = sum(batches.images.nbytes for batches in held) / 1e6
        return held, f"images are prepared by {device}, which holds them ({size:.1f} MB)"
    if options.data_on == "device":
        raise ProgramError(f"--data-on device cannot be: {reason}")
    found = [loader(images, order, workers, pin=device.type == "cuda") for images, order in parts]
    return found, f"images are prepared by {workers or 'no'} workers of each process: {reason}"


def _obstacle(device: torch.device, sets: Sequence[Images]) -> str | None:
    """Why the device cannot prepare the images of these sets, or None."""
    held = [samples.images.nbytes for samples in sets if isinstance(samples, Samples)]
    if len(held) < len(sets):
        return "they are files"
    if (reason := unavailable(device.type)) is not None:
        return f"the device cannot, {reason}"
    # Half of what is free is the network's. A CPU holds them already.
    if device.type == "cuda" and sum(held) > (free := torch.cuda.mem_get_info(device)[0]) // 2:
        return f"they take {sum(held):,} bytes, and {free:,} are free on {device}"
    return None

"""Loss, confusion matrix and top-5 accuracy of a network on labelled images, over all processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import networks, report
from .data import IGNORED, Batch, Batches, load, loader, workers_of
from .distributed import Processes
from .options import AMP, Options, ProgramError

__all__ = ["Result", "evaluate", "has_top5", "in_top", "of_checkpoint"]


class Result(NamedTuple):
    """What :func:`evaluate` found.

    Attributes:
        loss: mean cross-entropy, without label smoothing.
        confusion: counts ``int64 [classes, classes]``, rows true, columns predicted.
        top5: share of images whose class is among the five highest scores; None where classes are few.
    """

    loss: float
    confusion: Tensor
    top5: float | None

    @property
    def images(self) -> int:
        return int(self.confusion.sum())

    @property
    def right(self) -> int:
        return int(self.confusion.diagonal().sum())

    @property
    def accuracy(self) -> float:
        return self.right / self.images

    def of_classes(self) -> list[tuple[int, int]]:
        """For each class, how many of its images are right, and how many there are."""
        return list(zip(self.confusion.diagonal().tolist(), self.confusion.sum(1).tolist(), strict=True))


def has_top5(classes: int) -> bool:
    """Whether the top five of so many classes say anything: with ten, guessing has half of them right."""
    return classes > 10


def in_top(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether ``labels [N]`` are among the ``k`` highest of ``scores [N, classes]``: ``bool [N]``."""
    return (scores.topk(k, 1).indices == labels[:, None]).any(1)


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Iterable[Batch],
    inputs: Callable[[Batch], tuple[Tensor, Tensor]],
    autocast: Callable[[], torch.autocast],
    classes: int,
    processes: Processes,
) -> Result | None:
    """The network on all processes' batches, in eval mode, where it is left; None if no image could be read.

    inputs: moves a batch's images, prepared, and labels to the device.
    """
    network.eval()
    matrix = torch.zeros(classes * classes, dtype=torch.int64, device=processes.device)
    loss, top5 = torch.zeros(2, dtype=torch.float64, device=processes.device)
    for batch in batches:
        images, labels = inputs(batch)
        with autocast():
            scores = network(images)
        loss += F.cross_entropy(scores.float(), labels, ignore_index=IGNORED, reduction="sum")
        there = labels != IGNORED
        matrix += torch.bincount(labels[there] * classes + scores.argmax(1)[there], minlength=classes * classes)
        if has_top5(classes):
            top5 += in_top(scores, labels, 5).sum()
    confusion = processes.total(matrix).reshape(classes, classes)
    loss, top5 = processes.total(torch.stack([loss, top5]))
    count = int(confusion.sum())
    if count == 0:
        return None
    return Result(float(loss) / count, confusion, float(top5) / count if has_top5(classes) else None)


def of_checkpoint(options: Options, processes: Processes) -> tuple[list[str], Result]:
    """The result of the checkpoint ``options.evaluate`` on the test images of ``options.data``, and its classes.

    Model, size and normalisation of images are the checkpoint's.

    Raises:
        ProgramError: the checkpoint cannot be loaded or knows other classes, or no image can be read.
    """
    path = Path(str(options.evaluate))
    network, preparation = networks.of_checkpoint(path)
    data = load(dataclasses.replace(options, image_size=preparation.size))
    if processes.rank == 0:
        for warning in data.warnings:
            report.say(f"warning: {warning}")
    theirs, mine = data.preparation, preparation
    for name, found, wanted in (
        ("classes", theirs.classes, mine.classes),
        ("images of size", theirs.size, mine.size),
        ("channels", theirs.channels, mine.channels),
    ):
        if found != wanted:
            raise ProgramError(f"--data {options.data} has {name} {found}, but {path} was trained with {wanted}")
    network.to(processes.device)
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    like = torch.empty((), device=processes.device)
    broken: set[str] = set()

    def inputs(batch: Batch) -> tuple[Tensor, Tensor]:
        broken.update(batch.broken)
        images = networks.prepare(batch.images, preparation, like, memory_format)
        return images, batch.labels.to(processes.device)

    def autocast() -> torch.autocast:
        dtype = AMP[options.amp]
        return torch.autocast(processes.device.type, dtype, enabled=dtype is not None)

    batches = Batches(len(data.test), options.batch, processes.rank, processes.world)
    test = loader(data.test, batches, options.workers, processes.device.type == "cuda")
    with workers_of(test):
        result = evaluate(network, test, inputs, autocast, len(preparation.classes), processes)
    for name in sorted(broken):
        report.say(f"broken image: {name}")
    if result is None:
        raise ProgramError(f"no test image of --data {options.data} can be read")
    return preparation.classes, result

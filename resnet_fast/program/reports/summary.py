"""What a run says of itself, before its first step and after its epochs, and the reports at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ... import backends
from .. import report
from ..distributed import Processes
from ..evaluation import Result
from ..options import Options
from .history import held_out

if TYPE_CHECKING:
    from ..loop import Trainer

__all__ = ["epoch_line", "final", "result_text", "start_line"]


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _device(processes: Processes) -> str:
    one = "cpu" if processes.device.type == "cpu" else torch.cuda.get_device_name(processes.device)
    if processes.device.type == "cpu":
        one += f" ({_counted(torch.get_num_threads(), 'thread')})"
    return one if processes.world == 1 else f"{processes.world} processes, each {one}"


def _backend(options: Options, processes: Processes) -> str:
    if options.backend == "eager":
        return "backend eager: PyTorch's own operators"
    name = processes.device.type if options.backend == "auto" else options.backend
    return f"backend {name}: {backends.status()[name]}"


def start_line(
    options: Options,
    processes: Processes,
    network: nn.Module,
    images: dict[str, int],
    steps: int,
    epochs: int,
) -> str:
    """The run in a line; images: how many for what; steps: of an epoch."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    together = options.batch * options.accumulate * processes.world
    return (
        f"{options.model}, {parameters:,} parameters, on {_device(processes)}; {_backend(options, processes)}; "
        f"images: {', '.join(f'{number:,} for {what}' for what, number in images.items())}; "
        f"{_counted(epochs, 'epoch')} of {_counted(steps, 'step')} of {_counted(together, 'image')}; "
        f"writes into {options.out}"
    )


def epoch_line(row: dict[str, Any], epochs: int, world: int) -> str:
    """A row of the log in a line."""
    held = held_out(row)
    top5 = f", top-5 {row[f'{held}_top5']:.2%}" if f"{held}_top5" in row else ""
    speed = f"{row['images_per_s']:.0f} images/s" + (
        "" if world == 1 else f", {row['images_per_s'] / world:.0f} a process"
    )
    return (
        f"epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.2%}; "
        f"{held} {row[f'{held}_loss']:.4f}, {row[f'{held}_accuracy']:.2%}{top5}; {speed}"
    )


def result_text(result: Result) -> str:
    top5 = "" if result.top5 is None else f", top-5 {result.top5:.2%}"
    return f"{result.right} of {result.images} test images right, {result.accuracy:.2%}{top5}"


def final(trainer: Trainer, chosen: str) -> None:
    """The reports of the end: curves.png, confusion.png and classes.csv; what was found. All processes call it.

    chosen: which weights were tested, if not those of the last epoch.
    """
    broken = set().union(*trainer.processes.everyone(trainer.broken))
    folder, result, classes = trainer.folder, trainer.result, trainer.data.preparation.classes
    if result is None:
        return
    trainer.processes.from_first(lambda: report.class_log(folder / "classes.csv", classes, result.of_classes()))
    if trainer.processes.rank != 0:
        return
    report.draw(report.curves, folder / "curves.png", {trainer.options.model: trainer.history})
    report.draw(report.confusion_chart, folder / "confusion.png", result.confusion, classes)
    report.say(report.worst_classes(classes, result.of_classes()))
    on = " of the validation images" if trainer.options.validation else ""
    report.say(f"final: {result_text(result)}{chosen}; best epoch {trainer.best:.2%}{on}")
    if broken:
        report.say(f"{len(broken)} broken images were left out")

"""The reports of a run: a progress bar, log.csv, curves.png and confusion.png.

``python -m resnet_fast.program.report chart.png runs/a runs/b`` draws the curves of several runs in one chart.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .checkpoints import write
from .options import ProgramError
from .text import chart_labels, one_line, printable

__all__ = ["COLUMNS", "Bar", "confusion_chart", "curves", "draw", "log", "read_log", "say", "writable"]

COLUMNS = (
    "epoch",
    "step",
    "lr",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "images_per_s",
    "seconds",
)


def say(text: str) -> None:
    """Prints a line above the progress bar."""
    tqdm.write(printable(text))
    sys.stdout.flush()


def writable(folder: Path) -> None:
    """Raises ProgramError if no file can be written into ``folder``: before training, not after it."""
    probe = folder / ".writable"
    _write(probe, b"")
    probe.unlink(missing_ok=True)


class Bar:
    """Progress bar of an epoch: loss, accuracy, images/s, time left, share of time spent waiting for data.

    Silent if the output is no terminal.
    """

    def __init__(self, epoch: int, epochs: int, steps: int, first: int, show: bool) -> None:
        hidden = None if show else True  # None: tqdm hides it if there is no terminal
        self._bar = tqdm(total=steps, initial=first, desc=f"epoch {epoch}/{epochs}", unit="step", disable=hidden)
        self.started = time.perf_counter()
        self._shown = self._waited = 0.0
        self.images = 0

    def timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """``batches``; the time until each arrives counts as waiting for data."""
        start = time.perf_counter()
        for batch in batches:
            self._waited += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def step(self, images: int, sums: Tensor) -> None:
        self.images += images
        self._bar.update()
        now = time.perf_counter()
        # Reading the sums waits for the device.
        if not self._bar.disable and now - self._shown > 0.5:
            self._shown = now
            loss, correct, count = sums.tolist()
            self._bar.set_postfix_str(
                f"loss {loss / max(count, 1):.3f}, accuracy {correct / max(count, 1):.1%}, {self.speed():.0f} images/s"
                f", {self.waiting():.0%} waiting for data"
            )

    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def speed(self) -> float:
        return self.images / self.seconds()

    def waiting(self) -> float:
        """The share of the time that the loop spent waiting for data."""
        return self._waited / self.seconds()

    def close(self) -> None:
        self._bar.close()


def log(path: Path, history: list[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    _write(path, text.getvalue().encode())


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, content)
    except OSError as error:
        raise ProgramError(f"{path} cannot be written: {error.strerror}") from error


def _save(figure: Any, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    _write(path, image.getvalue())


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log.csv, as :func:`log` took them."""
    try:
        with path.open(newline="") as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError) as error:
        raise ProgramError(f"{path} cannot be read: {error}") from error


def _figure(**kwargs: Any) -> Any:
    # Figure, not pyplot: it looks for no display and leaves no global state.
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **kwargs)


def curves(path: Path, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Draws loss and accuracy by epoch of one or more runs, by name."""
    figure = _figure(figsize=(10, 4))
    left, right = figure.subplots(1, 2)
    for number, (name, history) in enumerate(runs.items()):
        epochs = [row["epoch"] for row in history]
        color = f"C{number % 10}"
        for axes, quantity, factor in ((left, "loss", 1), (right, "accuracy", 100)):
            train = [factor * row[f"train_{quantity}"] for row in history]
            test = [factor * row[f"test_{quantity}"] for row in history]
            axes.plot(epochs, train, "--", color=color, alpha=0.6, label=f"{name}, training")
            axes.plot(epochs, test, "-", color=color, label=f"{name}, test")
    left.set(xlabel="epoch", ylabel="loss", yscale="log")
    right.set(xlabel="epoch", ylabel="accuracy, %")
    right.legend(fontsize="small")
    _save(figure, path)


def confusion_chart(path: Path, matrix: Tensor, classes: list[str]) -> None:
    """Draws the confusion matrix: rows true, columns predicted, colour the share of a row, counts if they fit."""
    side = max(4.0, min(0.45 * len(classes) + 2, 20.0))
    figure = _figure(figsize=(side, side))
    axes = figure.subplots()
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= 40:
        labels, fonts = chart_labels(classes)
        axes.set_xticks(range(len(classes)), labels, rotation=90, parse_math=False, family=fonts)
        axes.set_yticks(range(len(classes)), labels, parse_math=False, family=fonts)
        for row, column in torch.nonzero(matrix).tolist():
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, int(matrix[row, column]), ha="center", va="center", color=color, fontsize=7)
    right = float(matrix.diagonal().sum()) / max(float(matrix.sum()), 1.0)
    axes.set(xlabel="predicted", ylabel="true", title=f"{right:.2%} of {int(matrix.sum())} right")
    _save(figure, path)


def draw(chart: Callable[..., None], path: Path, *content: Any) -> None:
    """``chart(path, *content)``; a chart that fails is said, and ends no run."""
    try:
        chart(path, *content)
    except Exception as error:
        say(f"warning: {path} is not drawn: {one_line(error)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m resnet_fast.program.report", description="The curves of several runs in one chart."
    )
    parser.add_argument("chart", type=Path, help="the PNG file to write")
    parser.add_argument("runs", type=Path, nargs="+", metavar="run", help="folders of resnet_fast.train")
    given = parser.parse_args(arguments)
    try:
        curves(given.chart, {run.name: read_log(run / "log.csv") for run in given.runs})
    except ProgramError as error:
        print(f"resnet_fast.program.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

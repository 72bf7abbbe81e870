"""The reports of a run: a progress bar, log.csv, classes.csv, curves.png and confusion.png.

``python -m resnet_fast.program.report chart.png runs/a runs/b`` draws the curves of several runs in one chart.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
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
from .reports.history import held_out
from .reports.text import chart_labels, one_line, printable

__all__ = [
    "Bar",
    "class_log",
    "confusion_chart",
    "curves",
    "draw",
    "log",
    "read_log",
    "say",
    "worst_classes",
    "writable",
    "write_text",
]


def say(text: str) -> None:
    """Prints a line above the progress bar; a terminal that was closed, or a pipe, does not end the run."""
    with contextlib.suppress(OSError):
        tqdm.write(printable(text))
        sys.stdout.flush()


def write_text(path: Path, content: str) -> None:
    """Writes ``content``; names of files keep the bytes that are no characters."""
    _write(path, content.encode("utf-8", "surrogateescape"))


def writable(folder: Path) -> None:
    """Raises ProgramError if no file can be written into ``folder``: before training, not after it."""
    probe = folder / ".writable"
    _write(probe, b"")
    probe.unlink(missing_ok=True)


class Bar:
    """Progress of an epoch: loss, accuracy, images/s, time left of all epochs, share of time spent waiting for data.

    A bar, or lines off a terminal.
    """

    every = 30.0  # seconds between lines

    def __init__(self, epoch: int, epochs: int, steps: int, first: int, show: bool) -> None:
        hidden = None if show else True  # None: tqdm hides it if there is no terminal
        self._name = f"epoch {epoch}/{epochs}"
        self._bar = tqdm(total=steps, initial=first, desc=self._name, unit="step", disable=hidden)
        self._lines = show and self._bar.disable
        self._steps, self._first, self._after = steps, first, (epochs - epoch) * steps
        self._done = first
        self.started = time.perf_counter()
        self._shown = self.started if self._lines else 0.0
        self._waited = 0.0
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
        self._done += 1
        self._bar.update()
        now = time.perf_counter()
        # Reading the sums waits for the device.
        if (self._lines or not self._bar.disable) and now - self._shown > (self.every if self._lines else 0.5):
            self._shown = now
            loss, correct, count = sums.tolist()
            state = (
                f"loss {loss / max(count, 1):.3f}, accuracy {correct / max(count, 1):.1%}, "
                f"{self.speed():.0f} images/s, {self.waiting():.0%} waiting for data, {self.left()} left in all"
            )
            if self._lines:
                say(f"{self._name}, step {self._done}/{self._steps}: {state}")
            else:
                self._bar.set_postfix_str(state)

    def left(self) -> str:
        """The time that the steps left of all epochs will take at the speed of this epoch's."""
        steps = self._steps - self._done + self._after
        return str(datetime.timedelta(seconds=round(steps * self.seconds() / max(self._done - self._first, 1))))

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
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, dict.fromkeys(name for row in history for name in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_text(path, table.getvalue())


def class_log(path: Path, classes: list[str], found: list[tuple[int, int]]) -> None:
    """Writes each class's images, how many of them are right, and the share; found: right and images of each."""
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("class", "images", "right", "accuracy"))
    for name, (right, images) in zip(classes, found, strict=True):
        writer.writerow((name, images, right, right / images if images else ""))
    write_text(path, table.getvalue())


def worst_classes(classes: list[str], found: list[tuple[int, int]], most: int = 10) -> str:
    """A line with the accuracy of each class, or of the worst where there are more than ``most``."""
    shares = [(right / images, name) for name, (right, images) in zip(classes, found, strict=True) if images]
    what = "accuracy of classes"
    if len(classes) > most:
        shares, what = sorted(shares)[:most], f"worst of {len(classes)} classes"
    return f"{what}: " + ", ".join(f"{name} {share:.1%}" for share, name in shares)


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
    """The rows of a log.csv, as :func:`log` took them.

    Raises:
        ProgramError: it cannot be read, has no rows, or lacks columns that :func:`curves` draws.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [
                {name: float(value) for name, value in row.items() if value not in ("", None)}
                for row in csv.DictReader(file)
            ]
    # A row with more values than the header has names gives a list: no float.
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise ProgramError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise ProgramError(f"{path} has no epoch yet")
    for row in rows:
        held = held_out(row)
        wanted = ("epoch", "train_loss", "train_accuracy", f"{held}_loss", f"{held}_accuracy")
        missing = [name for name in wanted if name not in row]
        if missing:
            raise ProgramError(f"{path} has no {', '.join(missing)}: want {', '.join(wanted)} in each row")
    return rows


def names_of(runs: list[Path]) -> list[str]:
    """A name for each folder: its last parts, as many as tell it from the others with that name."""
    parts = [run.absolute().parts for run in runs]
    names = []
    for mine in parts:
        others = [other for other in parts if other != mine]
        count = next((n for n in range(1, len(mine)) if all(other[-n:] != mine[-n:] for other in others)), len(mine))
        names.append(str(Path(*mine[-count:])))
    return names


def _figure(**kwargs: Any) -> Any:
    # Figure, not pyplot: it looks for no display and leaves no global state.
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **kwargs)


def curves(path: Path, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Draws loss and accuracy by epoch of one or more runs, by name."""
    _save(curves_figure(runs), path)


def curves_figure(runs: dict[str, list[dict[str, Any]]]) -> Any:
    """The figure of :func:`curves`."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(figsize=(10, 4.3))
    names, fonts = chart_labels(runs)
    title = ", ".join(names) if len(runs) <= 3 else f"{len(runs)} runs"
    figure.suptitle(f"Training of {title}", parse_math=False, family=fonts)
    left, right = figure.subplots(1, 2)
    labels = []
    for number, (name, history) in enumerate(zip(names, runs.values(), strict=True)):
        epochs = [row["epoch"] for row in history]
        style: dict[str, Any] = {"color": f"C{number % 10}", "marker": "o" if len(history) < 3 else None}
        held = held_out(history[-1])
        labels += [f"{name}, training", f"{name}, {held}"]
        for axes, quantity, factor in ((left, "loss", 1), (right, "accuracy", 100)):
            train = [factor * row[f"train_{quantity}"] for row in history]
            test = [factor * row.get(f"{held}_{quantity}", float("nan")) for row in history]
            axes.plot(epochs, train, "--", alpha=0.6, **style)
            axes.plot(epochs, test, "-", **style)
    left.set(xlabel="epoch", ylabel="loss", yscale="log")
    right.set(xlabel="epoch", ylabel="accuracy, %")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # matplotlib leaves labels with a first "_" out, and reads formulas between "$"; texts set later are as they are.
    legend = right.legend(right.get_lines(), [str(number) for number in range(len(labels))], fontsize="small")
    for entry, label in zip(legend.get_texts(), labels, strict=True):
        entry.set(text=label, parse_math=False, family=fonts)
    return figure


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
        logs = [read_log(run / "log.csv") for run in given.runs]
        curves(given.chart, dict(zip(names_of(given.runs), logs, strict=True)))
    except ProgramError as error:
        print(f"resnet_fast.program.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

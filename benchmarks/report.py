"""The report: a table for the terminal and the README, a chart, and the numbers as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch

import resnet_fast

from . import training
from .gpu.device import CPU, Device
from .runner import Result
from .variants import BASELINE, OURS

__all__ = ["RESULTS", "chart", "conditions", "save", "save_training", "table"]

RESULTS = Path(__file__).parent / "results" / "local"


def conditions(device: Device = CPU) -> str:
    """Where and by what the times were taken, in one line."""
    isa = resnet_fast.backends.isa() if resnet_fast.backends.loaded() else "no kernels"
    if device.dtype == torch.bfloat16 and resnet_fast.backends.bf16_products():
        isa += " with bfloat16 products"
    return (
        f"{device.describe()} ({os.cpu_count()} CPUs, kernels: {isa}), {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, resnet_fast {resnet_fast.__version__}, Python {platform.python_version()}, "
        f"{datetime.date.today()}"
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def table(results: list[Result]) -> str:
    """Markdown that also reads well in a terminal."""
    header = ("case", "variant", "ms (quartiles)", f"time / {BASELINE}", "speed-up", "error / eager's")
    rows = []
    for r in results:
        ms, ratio = r.seconds, r.ratio
        rows.append(
            (
                f"{r.group}, {r.images}",
                r.variant,
                f"{_milliseconds(ms.median)} ({_milliseconds(ms.low)}-{_milliseconds(ms.high)})",
                "1" if r.variant == BASELINE else f"{ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})",
                f"{1 / ratio.median:.2f}x",
                f"{r.error:.2f}",
            )
        )
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def chart(results: list[Result], path: Path, device: Device = CPU) -> None:
    """Bars of the ratio to eager channels_last with its quartiles, one panel a case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (f"{group}, {kind}", list(rows)) for (group, kind), rows in groupby(results, lambda r: (r.group, r.images))
    ]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(7 * columns, 0.9 + 2.1 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, rows) in zip(axes.flat, panels, strict=False):
        names = [r.variant for r in rows]
        medians = [r.ratio.median for r in rows]
        spread = [[r.ratio.median - r.ratio.low for r in rows], [r.ratio.high - r.ratio.median for r in rows]]
        colors = ["#c44e52" if name == OURS else "#8c9bb0" for name in names]
        bars = axis.barh(names, medians, xerr=spread, color=colors, ecolor="#404040", capsize=2)
        axis.bar_label(bars, labels=[f"{_milliseconds(r.seconds.median)} ms" for r in rows], padding=6, fontsize=8)
        axis.axvline(1, color="#404040", linewidth=0.8)
        axis.set_xlim(0, 1.25 * max(r.ratio.high for r in rows))
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(f"time / {BASELINE} (less is better)", fontsize=8)
        axis.tick_params(labelsize=8)
    figure.suptitle(conditions(device), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def save(results: list[Result], device: Device = CPU, machine: str = "") -> list[Path]:
    """Writes the table, the numbers and the chart to ``benchmarks/results``, which git ignores.

    machine: the line of :func:`benchmarks.busy.line`.
    """
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / datetime.datetime.now().strftime("%Y-%m-%d_%H%M%S")
    paths = [stem.with_suffix(suffix) for suffix in (".md", ".json", ".png")]
    _write(paths, table(results), results, device, machine)
    chart(results, paths[2], device)
    return paths


def save_training(results: list[training.Result], machine: str = "") -> list[Path]:
    """The same for training steps, without a chart."""
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / datetime.datetime.now().strftime("%Y-%m-%d_%H%M%S_training")
    paths = [stem.with_suffix(suffix) for suffix in (".md", ".json")]
    _write(paths, f"{training.table(results)}\n\n{training.readme_table(results)}", results, machine=machine)
    return paths


def _write(
    paths: list[Path],
    text: str,
    results: Sequence[Result | training.Result],
    device: Device = CPU,
    machine: str = "",
) -> None:
    said = "\n".join(filter(None, (conditions(device), machine)))
    paths[0].write_text(f"{said}\n\n{text}\n")
    numbers = {
        "conditions": conditions(device),
        "machine": machine,
        "results": [dataclasses.asdict(r) for r in results],
    }
    paths[1].write_text(json.dumps(numbers, indent=1) + "\n")

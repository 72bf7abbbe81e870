"""Training curves: the training program in several arithmetics, each from several seeds, in one chart.

    python -m benchmarks.curves --model cifar_resnet32 --epochs 6 --out runs/curves
    python -m benchmarks.curves --data cifar-10-python.tar.gz --model cifar_resnet32 --epochs 30 --out runs/cifar

Runs that --out already holds are resumed, and taken as they are where they are complete: a sweep that was stopped goes
on. Each seed draws the same weights, order of images and augmentation in every arithmetic.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

__all__ = ["VARIANTS", "Curve", "chart", "curves", "table"]

# Options of the program by the name in the legend.
VARIANTS = {
    "fused, bfloat16": ("--backend", "auto", "--amp", "bf16"),
    "eager, float32": ("--backend", "eager", "--amp", "off"),
}


class Curve(NamedTuple):
    """Rows of a run's log.csv, one an epoch."""

    variant: str
    seed: int
    rows: list[dict[str, float]]

    def values(self, column: str) -> list[float]:
        return [row[column] for row in self.rows]


def _folder(out: Path, variant: str, seed: int) -> Path:
    return out / f"{variant.replace(', ', '-')}-{seed}"


def _run(out: Path, variant: str, seed: int, options: list[str]) -> None:
    command = [sys.executable, "-m", "resnet_fast.train", *options, *VARIANTS[variant], "--seed", str(seed)]
    subprocess.run([*command, "--resume", "auto", "--out", str(_folder(out, variant, seed))], check=True)


def curves(out: Path, seeds: list[int]) -> list[Curve]:
    """The curves of the runs in ``out``.

    Raises:
        ValueError: a run is missing, or runs have different numbers of epochs.
    """
    found = []
    for seed in seeds:
        for variant in VARIANTS:
            log = _folder(out, variant, seed) / "log.csv"
            if not log.exists():
                raise ValueError(f"--out {out} holds no run of {variant} with seed {seed}: {log} is missing")
            with log.open() as lines:
                rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(lines)]
            found.append(Curve(variant, seed, rows))
    lengths = {len(c.rows) for c in found}
    if len(lengths) != 1:
        raise ValueError(f"--out {out} holds runs of {sorted(lengths)} epochs: they cannot be compared")
    return found


def table(found: list[Curve]) -> str:
    """Test accuracy after the last epoch, its mean and range over the seeds, as a Markdown table."""
    lines = ["| | test accuracy, mean | lowest - highest | training loss, mean |", "|---|---|---|---|"]
    for variant in VARIANTS:
        last = [c.rows[-1] for c in found if c.variant == variant]
        accuracy = [100 * row["test_accuracy"] for row in last]
        loss = statistics.mean(row["train_loss"] for row in last)
        lines.append(
            f"| {variant} | {statistics.mean(accuracy):.2f}% | {min(accuracy):.1f} - {max(accuracy):.1f} | {loss:.4f} |"
        )
    return "\n".join(lines)


def chart(found: list[Curve], title: str, path: Path) -> None:
    """Training loss and test accuracy by epoch, a line a run and a colour an arithmetic, into ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # The same file for the same runs, and a small one.
    matplotlib.rcParams.update({"svg.hashsalt": "curves", "svg.fonttype": "none"})
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for panel, column, label in zip(
        panels, ("train_loss", "test_accuracy"), ("training loss", "test accuracy"), strict=True
    ):
        for number, variant in enumerate(VARIANTS):
            runs = [c for c in found if c.variant == variant]
            for c in runs:
                name = f"{variant}, {len(runs)} seeds" if c is runs[0] else None
                panel.plot(c.values("epoch"), c.values(column), color=f"C{number}", alpha=0.7, label=name)
        panel.set(xlabel="epoch", ylabel=label)
        panel.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[1].legend(loc="lower right")
    figure.suptitle(title)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="mnist5k", help="as the training program's (default mnist5k)")
    parser.add_argument("--model", default="cifar_resnet32")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, curves.svg and curves.md")
    options = parser.parse_args()
    passed = ["--data", options.data, "--model", options.model, "--epochs", str(options.epochs)]
    for seed in options.seeds:
        for variant in VARIANTS:
            _run(options.out, variant, seed, passed)
    found = curves(options.out, options.seeds)
    chart(found, f"{options.model} on {Path(options.data).name}", options.out / "curves.svg")
    (options.out / "curves.md").write_text(table(found) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()

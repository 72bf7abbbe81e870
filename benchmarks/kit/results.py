"""The results of a run: one JSON with everything, one Markdown to read, one chart. Written anew after every row."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .options import Options
from .supervise import Phase

__all__ = ["chart", "markdown", "write"]

CONDITIONS = {
    "infer": "Every result was verified against float64 first. Medians (quartiles) of interleaved rounds; the images "
    "lie on the GPU, caches are warm. A call is timed by the host with its launches; a graph by the GPU's events, "
    "several replays in a row, without the host and without a copy of its input; torch.compile's graph is a call, its "
    "copy included. A graph is compared with the best of all peers, a call with the best of those that are called.",
    "train": "bfloat16 autocast, channels_last, SGD with momentum; gradients were verified against float64 first. "
    "ms: a step by the host's clock. kernels ms: the GPU at work in a step. peak: beyond what lies between steps.",
}


def _versions(phases: Iterable[Phase]) -> dict[str, str]:
    return next((p.versions for p in phases if p.versions), {"Python": platform.python_version()})


def write(phases: list[Phase], options: Options) -> str:
    """``results.json`` and ``results.md``; a reader never sees half a file. Returns what fits a terminal."""
    versions = _versions(phases)
    numbers = {
        "versions": versions,
        "options": dataclasses.asdict(options),
        "phases": [dataclasses.asdict(phase) for phase in phases],
    }
    _replace(Path(options.out, "results.json"), json.dumps(numbers, indent=1) + "\n")
    _replace(Path(options.out, "results.md"), markdown(phases, versions, options))
    return markdown(phases, versions, options, kernels=4)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def markdown(phases: list[Phase], versions: dict[str, str], options: Options, kernels: int = 25) -> str:
    """``kernels``: the most of a profile."""
    parts = [", ".join(f"{subject} {value}" for subject, value in versions.items())]
    if options.simulated:
        parts.append("**A rehearsal on the simulated device: no time in here means anything.**")
    head = ["phase", "state", "failures", "seconds", "limit, s"]
    rows = [[p.name, p.state, str(len(p.failures)), f"{p.seconds:.0f}", f"{p.limit:.0f}"] for p in phases]
    parts.append(_table(head, rows))
    for phase in phases:
        parts.append(f"## {phase.name}")
        if phase.name in CONDITIONS and len(phase.failures) < len(phase.rows):
            parts.append(CONDITIONS[phase.name])
        parts += _section(phase, kernels)
    return "\n\n".join(parts) + "\n"


def _section(phase: Phase, kernels: int) -> list[str]:
    notes = [f"- missing: {row['missing']}" for row in phase.rows if "missing" in row]
    # A row may say what it is about beside its error.
    notes += [f"- **{row.get('variant') or row['item']}**: {row['error']}" for row in phase.failures]
    found = [r for r in phase.rows if "error" not in r and "missing" not in r]
    tables: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in found:
        shown = _shown(row)
        columns = tuple(n for n in shown if not n.startswith(("best peer", "time / best peer")))
        tables.setdefault(columns, []).append(shown)
    parts = ["\n".join(notes)] if notes else []
    for rows in tables.values():
        head = max((list(r) for r in rows), key=len)
        parts.append(_table(head, [[r.get(column, "") for column in head] for r in rows]))
    for row in phase.rows:
        if "kernels" in row:
            listed = [[name[:110].replace("|", "/"), f"{us:.1f}", f"{n:g}"] for name, us, n in row["kernels"][:kernels]]
            parts.append(_table([f"{row['case']}, {row['variant']}", "us", "launches"], listed))
    return parts


def _shown(row: dict[str, Any]) -> dict[str, str]:
    """A row as text; quartiles go behind their median."""
    shown: dict[str, str] = {}
    for name, value in row.items():
        if name in ("item", "kernels") or name.endswith((" low", " high")):
            continue
        if f"{name} low" in row:
            shown[name] = f"{_number(value)} ({_number(row[f'{name} low'])}-{_number(row[f'{name} high'])})"
        else:
            shown[name] = _number(value)
    return shown


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return "" if value is None else str(value).replace("|", "/")


def _table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in [head, *rows]]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def chart(phases: list[Phase], options: Options) -> str | None:
    """Bars of the times of infer and train, a panel a case; the reason where there is none."""
    rows = [r for p in phases if p.name in ("infer", "train") for r in p.rows if "ms" in r]
    if not rows:
        return "nothing was timed"
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed here"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys((r["item"], r["case"]) for r in rows))
    lines = -(-len(cases) // 3)
    figure, axes = plt.subplots(lines, 3, figsize=(19, 0.8 + 2.3 * lines), squeeze=False)
    for axis in axes.flat[len(cases) :]:
        axis.axis("off")
    for axis, case in zip(axes.flat, cases, strict=False):
        here = [r for r in rows if (r["item"], r["case"]) == case]
        ms = [r["ms"] for r in here]
        spread = [[r["ms"] - r["ms low"] for r in here], [r["ms high"] - r["ms"] for r in here]]
        colors = ["#c44e52" if "resnet_fast" in r["variant"] else "#8c9bb0" for r in here]
        bars = axis.barh([r["variant"] for r in here], ms, xerr=spread, color=colors, ecolor="#404040", capsize=2)
        axis.bar_label(bars, labels=[f"{m:.3g} ms" for m in ms], padding=4, fontsize=8)
        axis.set_xlim(0, 1.25 * max(r["ms high"] for r in here))
        axis.invert_yaxis()
        axis.set_title(f"{case[1]}{', training' if case[0].endswith('training') else ''}", fontsize=9)
        axis.tick_params(labelsize=8)
    versions = _versions(phases)
    figure.suptitle(", ".join(f"{k} {v}" for k, v in versions.items())[:200], fontsize=8)
    figure.tight_layout()
    with contextlib.suppress(OSError):
        figure.savefig(Path(options.out, "results.png"), dpi=110)
    plt.close(figure)
    return None

"""``python -m benchmarks.gpu.roofline``: FLOPs and bytes of the networks on GPUs, computed, as tables and a chart."""

from __future__ import annotations

from pathlib import Path

import torch

import resnet_fast
from resnet_fast.diagnose.roofline import A100, H100, Roofline, roofline

NETWORKS = [("ResNet32", 8, 224), ("cifar_resnet32", 128, 32), ("resnet50", 8, 224)]
CHART = Path(__file__).parents[1] / "results" / "local" / "roofline.png"


def chart(found: dict[str, Roofline], path: Path) -> None:
    """Left: each layer under the two roofs. Right: what eager kernels move and what fused ones do."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (roofs, bars) = plt.subplots(1, 2, figsize=(13, 5), width_ratios=(3, 2), layout="constrained")
    dtype = next(iter(found.values())).dtype
    for gpu, style in ((A100, "-"), (H100, "--")):
        intensities = [4.0, gpu.flops[dtype] / gpu.bytes, 1024.0]
        roof = [min(gpu.flops[dtype], gpu.bytes * i) / 1e12 for i in intensities]
        roofs.plot(intensities, roof, style, color="0.3", label=f"{gpu.name} roof")
    for (name, result), marker in zip(found.items(), "os^", strict=True):
        x = [r.intensity for r in result.rows]
        y = [r.flops / A100.floor(r.flops, r.bytes, dtype) / 1e12 for r in result.rows]
        roofs.plot(x, y, marker, label=f"{name}, on the A100", alpha=0.6)
    roofs.set(xscale="log", yscale="log", xlabel="FLOP for each compulsory byte", ylabel="TFLOP/s at most")
    roofs.set_title("Convolutions with their epilogues, bfloat16")
    roofs.legend(loc="lower right")
    roofs.grid(alpha=0.3, which="both")

    totals = [result.total for result in found.values()]
    places = range(len(totals))
    widths = ((-0.2, "eager_bytes", "eager: conv, batch norm, add, ReLU apart", "0.65"), (0.2, "bytes", "fused", "C0"))
    for shift, field, label, colour in widths:
        shown = bars.bar(
            [p + shift for p in places], [getattr(t, field) / 1e6 for t in totals], 0.4, label=label, color=colour
        )
        bars.bar_label(shown, fmt="%.0f", padding=2)
    bars.set_xticks(list(places), list(found))
    bars.set(ylabel="MB through memory, one inference")
    bars.set_title("Bytes moved by all convolutions")
    bars.legend(loc="upper left")
    bars.margins(y=0.3)
    figure.suptitle("Computed from datasheets and shapes, not measured")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    found = {}
    for name, batch, size in NETWORKS:
        result = roofline(getattr(resnet_fast, name)().eval(), torch.empty(batch, 3, size, size, dtype=torch.bfloat16))
        found[f"{name}\nbatch {batch}, {size} x {size}"] = result
        print(f"{name}, batch {batch}, {size} x {size}, bfloat16\n\n{result}\n")
    chart(found, CHART)
    print(f"chart: {CHART}")


if __name__ == "__main__":
    main()

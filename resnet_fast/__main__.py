"""``python -m resnet_fast doctor``, ``explain MODEL`` and ``tune MODEL``."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path
from typing import Any

import torch

from . import models, reference
from .diagnose import system
from .diagnose.doctor import diagnosis
from .diagnose.explain import explain
from .diagnose.roofline import roofline

_NAMES = [name for name in models.__all__ if name not in ("CifarResNet", "ResNet")]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def _doctor(options: argparse.Namespace) -> None:
    system.show(diagnosis())


def _explain(options: argparse.Namespace) -> None:
    _check_numbers(options)
    if options.device == "cuda" and options.dtype == "float64":
        sys.exit("explain: --dtype is float64, want float32, bfloat16 or float16 with --device cuda")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    size, model = _model(options, reference if options.eager else models)
    dtype = _DTYPES[options.dtype]
    if options.device == "cuda":
        _explain_cuda(options, model.eval(), (options.batch, 3, size, size))
        return
    # channels_last is PyTorch's faster layout on CPUs, and what the kernels return.
    model = model.eval().to(device=options.device, dtype=dtype).to(memory_format=torch.channels_last)
    try:
        x = torch.randn(options.batch, 3, size, size, device=options.device, dtype=dtype)
    except (RuntimeError, TypeError):
        sys.exit(f"explain: no memory for {options.batch} images of {size} x {size}")
    print(
        f"{options.model}, {options.dtype}, batch {options.batch}, {size} x {size}, {torch.get_num_threads()} threads\n"
    )
    print(explain(model, x.contiguous(memory_format=torch.channels_last)))


def _explain_cuda(options: argparse.Namespace, model: torch.nn.Module, shape: tuple[int, ...]) -> None:
    """Prints the roofline and, where a GPU is visible, the kernel chosen for each layer."""
    print(roofline(model, torch.empty(shape, dtype=_DTYPES[options.dtype], device="meta")))
    if not torch.cuda.is_available():
        print("No CUDA device is visible: no time was measured.")
        return
    _run_on_gpu(options, model, shape, training=True)
    print("\nMeasured once on this GPU, for each shape of a convolution the fastest kernel:")
    _print_choices()


def _run_on_gpu(options: argparse.Namespace, model: torch.nn.Module, shape: tuple[int, ...], training: bool) -> None:
    """Runs the network once, which chooses its kernels; a training step chooses for forward and both gradients."""
    dtype = _DTYPES[options.dtype]
    x = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        model.to("cuda", dtype)(x)
    if training:
        getattr(model.train(), "logits", model)(x).sum().backward()
    torch.cuda.synchronize()


def _print_choices() -> None:
    from .gpu.tune import choices

    for layer, (choice, seconds) in choices().items():
        print(f"  {_chosen(layer, choice)}")
        if seconds:
            fastest_first = sorted(seconds.items(), key=lambda found: found[1])
            print("      us: " + ", ".join(f"{name} {s * 1e6:.1f}" for name, s in fastest_first))


def _tune(options: argparse.Namespace) -> None:
    _check_numbers(options)
    if not torch.cuda.is_available():
        sys.exit("tune: no CUDA device is visible to PyTorch")
    from .gpu import shipped
    from .gpu.tune import tuner

    size, model = _model(options, models)
    begin = time.perf_counter()
    _run_on_gpu(options, model.eval(), (options.batch, 3, size, size), options.training)
    _print_choices()
    found = tuner(torch.device("cuda", torch.cuda.current_device()))
    print(
        f"{options.model}, {options.dtype}, batch {options.batch}, {size} x {size}: {time.perf_counter() - begin:.1f} s"
    )
    print(f"choices for {found.name}: {found.file}")
    if options.export:
        shipped.export(found.name, found.entries(), options.export, datetime.date.today().isoformat())
        print(f"written: {options.export}")


def _check_numbers(options: argparse.Namespace) -> None:
    """Exits with a message if a count is less than 1."""
    for name in ("batch", "image_size", "threads"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            sys.exit(f"{options.command}: --{name.replace('_', '-')} is {value}, want at least 1")


def _model(options: argparse.Namespace, module: Any) -> tuple[int, Any]:
    """The side of the images, and the network."""
    size = options.image_size
    if size is None:
        size = 32 if options.model.startswith("cifar") else 224
    sized = {"image_size": size} if options.model == "ResNet32" else {}
    torch.manual_seed(0)
    try:
        return size, getattr(module, options.model)(**sized)
    except ValueError as error:  # images too small for this network
        sys.exit(f"{options.command}: {error}")


def _chosen(layer: Any, choice: object) -> str:
    """One line: role, convolution, choice; ``layer`` is a name where a whole chain was chosen for."""
    if isinstance(layer, str):
        return f"{layer}: {choice}"
    size = f"{layer.batch}x{layer.out_channels}x{layer.out_height}x{layer.out_width}"
    filters = f"{layer.kernel[0]}x{layer.kernel[1]}/{layer.stride[0]}"
    return f"{layer.role:<15} {filters} {layer.channels} -> {size}: {choice}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m resnet_fast", description=__doc__)
    commands = parser.add_subparsers(required=True)
    doctor = commands.add_parser("doctor", help="what is installed and in use here, and why not more")
    doctor.set_defaults(run=_doctor)
    layers = commands.add_parser("explain", help="kernel, work and time of each layer")
    layers.add_argument("model", choices=_NAMES, metavar="MODEL", help=", ".join(_NAMES))
    layers.add_argument("--batch", type=int, default=1)
    layers.add_argument("--image-size", type=int, help="default 224, or 32 for the CIFAR networks")
    layers.add_argument("--dtype", choices=list(_DTYPES), default="float32")
    layers.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    layers.add_argument("--threads", type=int, help="default: as many as PyTorch takes")
    layers.add_argument("--eager", action="store_true", help="the same network in plain PyTorch")
    layers.set_defaults(run=_explain, command="explain")
    tune = commands.add_parser("tune", help="measure ahead of time which kernels are fastest on this GPU")
    tune.add_argument("model", choices=_NAMES, metavar="MODEL", help=", ".join(_NAMES))
    tune.add_argument("--batch", type=int, default=1)
    tune.add_argument("--image-size", type=int, help="default 224, or 32 for the CIFAR networks")
    tune.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    tune.add_argument("--training", action="store_true", help="a training step, too")
    tune.add_argument("--export", type=Path, metavar="FILE", help="write all that is known of this GPU as a table")
    tune.set_defaults(run=_tune, command="tune")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()

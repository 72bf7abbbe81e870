"""What a plain call on a GPU takes the host, measured on any machine: kernels are launched that do nothing.

    python -m benchmarks.gpu.host [--training] [--batch 1] [--dtype float16] [NETWORK ...]

Two ways beside each other: a launch a layer from Python, and the tape that C++ replays. The GPU's own time is not in
it; a call is bound by the larger of the two. With ``--training`` a call is forward and backward under autocast: the
classifier, the loss and the optimizer are not in it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import resnet_fast
from resnet_fast import backends
from resnet_fast.backends import launch
from resnet_fast.gpu.tape import Tape

NETWORKS = ("ResNet32", "resnet18", "resnet50", "cifar_resnet32")
ROUNDS, SECONDS = 15, 0.02


class Nothing:
    """A device whose launches do nothing."""

    replay: launch.Replay = False

    def __init__(self) -> None:
        self.launches = 0

    def has_cuda(self, name: str) -> bool:
        return True

    def triton(
        self, kernel: Any, grid: Any, args: Sequence[Any], meta: dict[str, Any], reaches: Sequence[Any] = ()
    ) -> Any:
        self.launches += 1
        return kernel, args

    def cuda(self, name: str, grid: Any, block: Any, shared: int, args: Sequence[Any]) -> None:
        self.launches += 1

    def compiled_triton(self, ran: Any) -> tuple[launch.Compiled, tuple[str, ...]]:
        kernel, args = ran
        passed = tuple(name for name, value in zip(kernel.arg_names, args, strict=False) if value is not None)
        return launch.Compiled(0, True, 128, 0, ("i64",) * len(passed), 2, None), passed

    def compiled_cuda(self, name: str, threads: int, shared: int, args: Sequence[Any]) -> launch.Compiled:
        return launch.Compiled(0, False, threads, shared, ("i64",) * len(args), 0, None)


def _samples(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of this process's own time a call of each, in turn: other processes do not count."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            count, begin = 0, time.process_time()
            while (spent := time.process_time() - begin) < SECONDS:
                call()
                count += 1
            found[name].append(spent / count)
    return found


def measure(name: str, batch: int, dtype: torch.dtype, training: bool = False) -> dict[str, Any]:
    """Microseconds a call of network ``name`` in either way, medians and quartiles, and its launches."""
    model = getattr(resnet_fast, name)(num_classes=1)  # the classifier is computed, by this machine
    # What PyTorch computes between chains, as max pooling is in training, is computed: then images are small.
    size = 32 if name.startswith("cifar") else 64 if training else 224
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    device = Nothing()
    with torch.set_grad_enabled(training), launch.use_device(device):
        call = _step(model.train(), x, dtype) if training else _inference(model.eval().to(dtype), x.to(dtype))
        for _ in range(3):
            call()
        device.launches = 0
        by_python = _from_python(call)
        by_python()
        launches = device.launches
        if not any(isinstance(t, Tape) for t in _tapes(model)):
            raise RuntimeError(f"{name} is not replayed: {_tapes(model)}")
        times = _samples({"python": by_python, "tape": call})
    row: dict[str, Any] = {"network": name, "batch": batch, "dtype": str(dtype), "launches": launches}
    for way, seconds in times.items():
        low, middle, high = (1e6 * q for q in statistics.quantiles(seconds, n=4))
        row[way] = {"median": middle, "quartiles": [low, high], "a launch": middle / launches}
    return row


def _inference(model: torch.nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: model(x)


def _step(model: Any, x: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    parameters = list(model.parameters())

    def step() -> None:
        for p in parameters:
            p.grad = None
        with torch.autocast("cpu", dtype):
            maps = model.features(x)
        maps.backward(maps.detach())

    return step


def _from_python(call: Callable[[], object]) -> Callable[[], object]:
    def by_python() -> None:
        backends.cuda.replay = False
        try:
            call()
        finally:
            backends.cuda.replay = True

    return by_python


def _tapes(model: Any) -> list[Any]:
    modules = [*model.modules(), *(m._whole for m in model.modules() if getattr(m, "_whole", None))]
    owners = [m._chain.gpu for m in modules if getattr(m, "_chain", None)]
    owners += [m._program.passes._replayed for m in modules if getattr(m, "_program", None)]
    owners += [model._network] if getattr(model, "_network", None) else []
    return [tape for owner in owners for tape in owner.tapes.found.values()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.host", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS, metavar="NETWORK")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--training", action="store_true", help="forward and backward under autocast")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{'':16s} launches   from Python, us   a launch   tape, us   a launch")
    for name in options.networks:
        row = measure(name, options.batch, getattr(torch, options.dtype), options.training)
        python, tape = row["python"], row["tape"]
        print(
            f"{name:16s} {row['launches']:8d} {python['median']:17.0f} {python['a launch']:10.1f}"
            f" {tape['median']:10.0f} {tape['a launch']:10.1f}"
        )


if __name__ == "__main__":
    main()
